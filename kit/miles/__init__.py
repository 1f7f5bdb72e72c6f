"""The way to Miles and back: launch scripts written and read.

    export_script(config)       the bash script that trains the same in Miles
    import_script("run.sh")     the configuration that trains the same here; nothing is run

    table.py    which settings and flags mean the same: both directions are made from it
    links.py    what an entry of it is; given.py what a script said; flags.py the other flags
    writing.py  the script; bash.py and reading.py the way back; page.py the table as a page
    rows.py     prompts as files that Miles reads
    rewards.py  the kit's rewards, in the form that Miles calls

What is here of Miles are names and defaults of its flags.
"""

from __future__ import annotations

from kit.miles.export_script import Exported, export_script
from kit.miles.import_script import Imported, import_script

__all__ = ["Exported", "Imported", "export_script", "import_script"]
