"""Make `docs/from_and_to_miles.md` from the table of settings and flags.

Run it with `.venv/bin/python docs/make_miles_page.py`.
"""

from __future__ import annotations

from pathlib import Path

from kit.config import SessionConfig
from kit.miles.export_script import reason, settings_of
from kit.miles.links import Link, get
from kit.miles.table import LINKS

PAGE = Path(__file__).parent / "from_and_to_miles.md"


_INTRODUCTION = """\
# From Miles and to Miles

The kit is for one machine and for looking inside. A recipe that works and needs a cluster can move
to [Miles](https://github.com/radixark/miles), and a recipe of Miles can be brought here and read.

```
kit export miles config.yaml -o run.sh      # the launch script that trains the same in Miles
kit import miles run.sh -o config.yaml      # and back; the script is read, never run
```

`export` also takes a preset's name. With `--data FOLDER` it also writes the prompts, of any source,
as the JSONL files that Miles reads. The script is for Miles' FSDP trainer, which is also the kit's;
`--train-backend megatron` writes one for the other, which ppo and adapters need. Settings without a
flag are in the script as comments. Paths are at its top, to be changed in one place.

`import` understands arrays, variables with defaults, quotes, continued lines and sourced files. It
evaluates no conditions and runs no commands. Flags without a counterpart are listed with the
reason, and misspelt ones with the nearest name. Flags that a script omits have Miles' defaults.

Miles and the kit log metrics under the same names and steps, so dashboards keep working: see
`logging` in the settings.

## Settings and flags
"""


_WITHOUT = """
## Settings without a flag

| setting | why |
|---|---|
"""


def page() -> str:
    """The page as Markdown."""
    lines = ["", "| setting | flag of Miles | default here | default there | remark |"]
    lines += ["|---|---|---|---|---|", *map(_row, LINKS)]
    linked = {link.setting for link in LINKS} | {"engine.extra", "name"}
    missing = [setting for setting in settings_of() if setting not in linked]
    rows = [f"| `{setting}` | {_cell(reason(setting))} |" for setting in missing]
    extra = (
        "\nFurther settings of SGLang go in `engine.extra` here, and as `--sglang-...` there.\n"
        "`name` is only a label.\n"
    )
    return _INTRODUCTION + "\n".join(lines) + "\n" + extra + _WITHOUT + "\n".join(rows) + "\n"


def _row(link: Link) -> str:
    flags = "<br>".join(f"`{flag}`" for flag in link.flags)
    here = _shown(get(SessionConfig(), link.setting))
    cells = [f"`{link.setting}`", flags, f"`{here}`", _cell(link.default), _cell(link.remark)]
    return "| " + " | ".join(cells) + " |"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    return str(list(value)) if isinstance(value, tuple) else str(value) or '""'


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
