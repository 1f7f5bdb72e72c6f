"""Launch scripts of Miles, written from settings and read back into them.

    export_script(config)       the bash script that trains the same in Miles
    import_script("run.sh")     the configuration that trains the same here; nothing is run

    table.py          which settings and flags mean the same; both directions are made from it
    links.py          what an entry of it is, and the flags of a script; links_training.py,
                      links_rollout.py and links_machine.py hold the entries
    flags.py          flags that the kit does without, and why
    export_script.py  settings to a script, and prompts to files that Miles reads
    shell.py          the flags of a script, found without running it
    import_script.py  these flags to settings
    page.py           the table as docs/from_and_to_miles.md
    rewards.py        the kit's rewards, in the form that Miles calls

Only names and defaults of flags come from Miles.
"""

from __future__ import annotations

from kit.miles.export_script import Exported, export_script
from kit.miles.import_script import Imported, import_script

__all__ = ["Exported", "Imported", "export_script", "import_script"]
