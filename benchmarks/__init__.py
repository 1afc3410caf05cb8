"""The companion's mechanisms beside the libraries, on the same work in one run (`make bench`)."""
