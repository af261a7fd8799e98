"""SimCLR v1 (arXiv 2002.05709) and v2 (arXiv 2006.10029) pretraining in JAX, from a laptop to a TPU pod."""

__version__ = "0.1.0"


def __getattr__(name):
  # Lazily, so that `simclr --help` and `import simclr_jax` do not wait for JAX.
  if name in ("pretrain", "embed", "probe", "load_encoder"):
    from simclr_jax.runtime import cpu

    cpu.choose_platform()
    from simclr_jax import api

    return getattr(api, name)
  raise AttributeError(f"module 'simclr_jax' has no attribute {name!r}")
