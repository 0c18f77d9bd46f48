"""What lossy settings cost, measured; and what a pool makes of a trace of requests.

``divergence`` is arithmetic and lies below the engine; ``quality`` and ``replay`` and what they are
made of lie above it. Import the modules, not this package.
"""
