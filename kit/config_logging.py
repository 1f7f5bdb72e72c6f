"""`LoggingConfig`: where metrics go besides the run's own files."""

from __future__ import annotations

from typing import Literal

from kit.config_base import Section


class LoggingConfig(Section):
    """Copies of the metrics for TensorBoard, Weights & Biases and trackio, under Miles' names.

    The run's own files are the truth. A logger that fails is told once and stops nothing.
    """

    dir: str = ""
    """Folder of what they write: `tensorboard/`, `wandb/` and `trackio/` in it. Empty: the run's
    folder in a batch run, otherwise one of its own in `logs/`."""
    use_tensorboard: bool = False
    """Write event files; look at them with `tensorboard --logdir`."""
    tb_project_name: str = ""
    """A folder in `tensorboard/`; empty takes none."""
    tb_experiment_name: str = ""
    """A folder in that one; empty takes none."""
    use_wandb: bool = False
    """Log to Weights & Biases. The key is never a setting: `wandb login`, or WANDB_API_KEY."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """offline only writes files, which `wandb sync` sends later. None: as WANDB_MODE says, else
    online."""
    wandb_project: str = "kit"
    """The project that the run belongs to."""
    wandb_team: str = ""
    """The entity that the project belongs to; empty takes your own."""
    wandb_group: str = ""
    """The group of runs that it belongs to; empty takes the session's name."""
    wandb_run_id: str = ""
    """Go on with this run, such as one that a killed kernel had begun; empty begins one."""
    wandb_host: str = ""
    """Address of a server of your own; empty takes wandb's."""
    wandb_always_use_train_step: bool = False
    """Count `rollout/step` and `eval/step` in optimizer steps, not in rollouts."""
    use_trackio: bool = False
    """Log to trackio, which keeps runs on this machine; `trackio show` serves them."""
    trackio_project: str = ""
    """Empty takes `wandb_project`."""
    trackio_run_name: str = ""
    """Empty takes the run folder's name, or the session's."""
    trackio_group: str = ""
    """Empty takes `wandb_group`, or the session's name."""
    trackio_space_id: str = ""
    """Log to this Space of the Hugging Face hub, not to files."""
    trackio_server_url: str = ""
    """Log to a trackio server of your own, not to files."""

    @property
    def used(self) -> tuple[str, ...]:
        """The loggers that are asked for."""
        asked = {
            "tensorboard": self.use_tensorboard,
            "wandb": self.use_wandb and self.wandb_mode != "disabled",
            "trackio": self.use_trackio,
        }
        return tuple(name for name, wanted in asked.items() if wanted)
