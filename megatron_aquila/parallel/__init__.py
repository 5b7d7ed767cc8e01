"""Who talks to whom: groups, collectives with their adjoints, and the layers that are split over them."""
