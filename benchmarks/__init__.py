"""sightloop beside its peers on one machine: same weights, same images, same precision. `make bench`.

Prints and stores ratios; asserts nothing about time. Each side runs in a process of its own, and they take turns.
"""
