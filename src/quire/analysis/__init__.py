"""What lossy settings cost, measured.

``divergence`` is arithmetic and lies below the engine; ``quality`` and what it is made of lie above
it. Import the modules, not this package.
"""
