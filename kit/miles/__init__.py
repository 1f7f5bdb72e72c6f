"""The way to Miles and back: launch scripts written and read.

    export_script(config)       the bash script that trains the same in Miles
    import_script("run.sh")     the configuration that trains the same here; nothing is run

    table.py           LINKS, from which both directions are made: all of the entries below
    links.py           what an entry is, and what a script said
    links_adapters.py  entry: model.lora
    links_drafts.py    entry: engine.speculative
    links_rollout.py   entries: prompts, rollouts, evaluation
    links_training.py  entries: estimator and loss
    links_machine.py   entries: optimizer, devices, engine, logging
    flags.py           flags of Miles without a counterpart, with the reason
    export_script.py   the script, and prompts as files that Miles reads
    import_script.py   the way back
    shell.py           bash, as far as launch scripts use it: read and never run
    rewards.py         the kit's rewards, in the form that Miles calls

Of Miles, the kit knows the names and defaults of its flags, and nothing else.
"""

from __future__ import annotations

from kit.miles.export_script import Exported, export_script
from kit.miles.import_script import Imported, import_script

__all__ = ["Exported", "Imported", "export_script", "import_script"]
