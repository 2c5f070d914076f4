"""Speed, as ratios within one run: `make bench`, or `make bench ONLY=rater`. Never part of the tests."""
