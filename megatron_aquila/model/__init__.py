"""The network, written once for every layout."""
