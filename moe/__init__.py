"""The sparse layer: router, balancing, capacity, dispatcher, experts and what is measured of them."""
