"""`simclr config RECIPE`: every resolved value of a recipe, where it comes from, and what it means.  Imports no JAX."""

from simclr_jax.programs import config as config_lib


def run(recipe: str, overrides=()) -> str:
  """The program `simclr config`: prints and returns one line per key.

  Args:
    recipe: as for --config.
    overrides: strings `--config.KEY=VALUE`.

  Raises:
    ValueError: as config.load.
  """
  config = config_lib.load(recipe, overrides)
  given = {"recipe": config_lib.flatten(config_lib.read_recipe(recipe)), "command line": config_lib.parse(overrides)}

  def origin(key):
    found = [who for who, keys in given.items() if any(f"{key}.".startswith(f"{one}.") for one in keys)]
    return found[-1] if found else "default"

  text = config_lib.explain(config, origin)
  print(f"{recipe}, for simclr {config.program}\n\n{text}")
  return text


def main(flags, overrides) -> int:
  run(flags.recipe, overrides)
  return 0
