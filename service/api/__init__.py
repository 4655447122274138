"""The endpoints, one file per noun. Each takes an `Exchange` and returns an `Answer`; the route table is in `app`."""
