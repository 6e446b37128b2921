"""`make bench-failover`: servers that die, freeze, are promoted and return, under four pools of eight workers each."""
