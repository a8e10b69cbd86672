"""One program per benchmark, on shared machinery."""
