"""`simclr completion bash|zsh`: a script that completes commands, flags, recipes and the keys of configs.  Imports no JAX.

It is static: made of the parser once, so that completing starts no Python.
"""

from simclr_jax.programs import config as config_lib
from simclr_jax.programs import recipes

# In bash a word ends at "=", so that only what follows it is replaced; in zsh the whole word is.  zsh has no compopt: there no
# space follows any word, for after "=" it would end the flag.
SCRIPT = """\
_simclr() {
  local line="${COMP_LINE:0:$COMP_POINT}" current command flags prefix=""
  current="${line##* }"
  command="${line#* }"
  command="${command%%[ =]*}"
  if [ "$COMP_CWORD" -le 1 ]; then
    COMPREPLY=($(compgen -W "@COMMANDS@" -- "$current"))
    return
  fi
  [ -z "${ZSH_VERSION:-}" ] || prefix="${current%%=*}="
  case "$command" in
@CASES@
  esac
  case "$command $current" in
    *" --config="*) COMPREPLY=($(compgen -P "$prefix" -W "@RECIPES@" -- "${current#*=}")) ;;
    *" --"*=*) COMPREPLY=($(compgen -P "$prefix" -f -- "${current#*=}")) ;;
    *" -"*)
      COMPREPLY=($(compgen -W "$flags" -- "$current"))
      case "${COMPREPLY[*]}" in *=) compopt -o nospace 2> /dev/null ;; esac ;;
    "recipes "* | "config "*) COMPREPLY=($(compgen -W "@RECIPES@" -- "$current")) ;;
    *) COMPREPLY=($(compgen -W "$flags" -f -- "$current")) ;;
  esac
}
complete -o default @NOSPACE@-F _simclr simclr
"""


def script(parsers: dict, shell: str) -> str:
  """The script.

  Args:
    parsers: {command: its argparse parser}; one with an attribute `takes`, a program, takes the keys of its config too.
    shell: "bash" or "zsh".
  """
  cases = []
  for name, parser in parsers.items():
    words = []
    for action in parser._actions:
      words += [f"{flag}=" if action.nargs != 0 else flag for flag in action.option_strings if flag.startswith("--")]
      words += [] if action.option_strings or not action.choices else list(action.choices)
    words += (
      [f"--config.{row.key}=" for row in config_lib.describe(config_lib.PROGRAMS[parser.takes])] if parser.takes else []
    )
    cases.append(f'    {name}) flags="{" ".join(words)}" ;;')
  filled = {"COMMANDS": " ".join(parsers), "RECIPES": " ".join(recipes.all_headers()), "CASES": "\n".join(cases)}
  filled["NOSPACE"] = "-o nospace " if shell == "zsh" else ""
  text = SCRIPT
  for name, words in filled.items():
    text = text.replace(f"@{name}@", words)
  return ("autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "") + text


def main(flags, overrides) -> int:
  print(script(flags.parsers, flags.shell), end="")
  return 0
