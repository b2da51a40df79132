"""How XLA compiles what tests run."""

QUICK_XLA = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_multi_thread_eigen=false"
)
"""Programs run for milliseconds and compile for seconds: a third of that, by these flags."""
