"""Log-sum-exp merge of partial attention results."""
