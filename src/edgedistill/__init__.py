"""edgedistill: distil large image classifiers into networks that classify hundreds of frames a second on a CPU.

The stages are sub-packages joined by files only: ``data`` -> ``teacher`` -> ``student`` -> ``export`` -> ``runtime``.
"""

__version__ = "0.1.0"
