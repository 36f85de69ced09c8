"""Weight sync: a plan of buckets, the push, and the probe that shows whether it worked."""
