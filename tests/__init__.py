"""QUICK: XLA's flags under which tests compile in a third of the time; the laws hold for unoptimised programs too."""

from importlib.metadata import version

QUICK = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # a later one refuses the flag
    QUICK += " --xla_cpu_use_fusion_emitters=false"
