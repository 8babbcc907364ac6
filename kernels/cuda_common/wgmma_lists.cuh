// Operand lists of the matrix instructions' inline assembly, which takes every sum by itself: for N sums of a thread
// their places (%0 is the first) and the sums d[from] on.
#pragma once

#define WGMMA_PLACES_4 "%0, %1, %2, %3"
#define WGMMA_PLACES_8 WGMMA_PLACES_4 ", %4, %5, %6, %7"
#define WGMMA_PLACES_16 WGMMA_PLACES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_PLACES_24 WGMMA_PLACES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_PLACES_32 WGMMA_PLACES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_PLACES_48 \
  WGMMA_PLACES_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_PLACES_56 WGMMA_PLACES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_PLACES_64 WGMMA_PLACES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_PLACES_96 \
  WGMMA_PLACES_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_PLACES_128 \
  WGMMA_PLACES_96 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define WGMMA_SUMS_4(d, from) "+f"((d)[from]), "+f"((d)[(from) + 1]), "+f"((d)[(from) + 2]), "+f"((d)[(from) + 3])
#define WGMMA_SUMS_8(d, from) WGMMA_SUMS_4(d, from), WGMMA_SUMS_4(d, (from) + 4)
#define WGMMA_SUMS_16(d, from) WGMMA_SUMS_8(d, from), WGMMA_SUMS_8(d, (from) + 8)
#define WGMMA_SUMS_24(d, from) WGMMA_SUMS_16(d, from), WGMMA_SUMS_8(d, (from) + 16)
#define WGMMA_SUMS_32(d, from) WGMMA_SUMS_16(d, from), WGMMA_SUMS_16(d, (from) + 16)
#define WGMMA_SUMS_48(d, from) WGMMA_SUMS_32(d, from), WGMMA_SUMS_16(d, (from) + 32)
#define WGMMA_SUMS_56(d, from) WGMMA_SUMS_48(d, from), WGMMA_SUMS_8(d, (from) + 48)
#define WGMMA_SUMS_64(d, from) WGMMA_SUMS_32(d, from), WGMMA_SUMS_32(d, (from) + 32)
#define WGMMA_SUMS_96(d, from) WGMMA_SUMS_64(d, from), WGMMA_SUMS_32(d, (from) + 64)
#define WGMMA_SUMS_128(d, from) WGMMA_SUMS_64(d, from), WGMMA_SUMS_64(d, (from) + 64)
