"""Pages from templates: everything that a template inserts is escaped, and a page is one file that loads nothing.

Style, scripts and pictures are inside the page; a Content-Security-Policy makes a browser enforce that.
"""

import datetime
import functools
import importlib.resources
import os
import pathlib
import shlex
import sys

import jinja2
from markupsafe import Markup

import simclr_jax
from simclr_jax.report import pictures, tables
from simclr_jax.runtime import files


def write_page(path, template: str, computed: bool = True, **data):
  """Renders a file of templates/ with `data` and writes it to `path` in one move; `computed`: whether on JAX's devices."""
  page = _environment().get_template(template).render(nav=[], made=_made(computed), **data)
  files.write_bytes(path, page.encode("utf-8", "replace"))


def _made(computed: bool) -> dict:
  """When, by which version, on what and by which command a page is written: dict(text, command)."""
  parts = [f"Written {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC with simclr_jax {simclr_jax.__version__}"]
  if computed:  # else JAX need not be there, and no device is touched
    import jax

    devices = jax.devices()
    cores = f" of {os.cpu_count()} cores" if devices[0].platform == "cpu" else ""
    parts.append(f"on {len(devices)} x {devices[0].device_kind}{cores}")
  program = pathlib.Path(sys.argv[0])
  called = program.name == "simclr" or program.parts[-2:] == ("simclr_jax", "__main__.py")
  return {"text": " ".join(parts), "command": shlex.join(["simclr", *sys.argv[1:]]) if called else ""}


@functools.cache
def _environment() -> jinja2.Environment:
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader(__package__),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=["jinja2.ext.do"],
  )
  environment.globals["inlined"] = _inlined
  environment.filters |= dict(percent=tables.percent, duration=duration, data_url=pictures.data_url, repr=repr)
  environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
  return environment


def _inlined(name: str) -> Markup:
  """A style sheet or a script of this package, to stand in a page as it is."""
  return Markup(importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))


def duration(seconds) -> str:
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, seconds = divmod(round(seconds), 60)
  return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
