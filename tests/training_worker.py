"""Run by tests in a process of its own: trains on a tiny course folder, each job in a fork, some killed on the way.

Usage: training_worker.py JOBS.json, a list of {"home", "overrides", "tracking", "kill"}. The parent process imports
once and computes nothing, so a fork of it is like a new process without the seconds of importing.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path


def kill(*_arguments, **_options):
    os.kill(os.getpid(), signal.SIGKILL)


def killing_callback(moment: str, step: int):
    from transformers import TrainerCallback

    class Killer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if moment == "step" and state.global_step == step:
                kill()

        def on_evaluate(self, args, state, control, **kwargs):
            if moment == "evaluation" and state.global_step == step:
                kill()

    return Killer()


def arm(moment: str, step: int) -> list:
    """Have SIGKILL come at a moment of the run."""
    if moment == "checkpoint":  # adapter and optimizer are written; random states and trainer state are not
        from trl import SFTTrainer

        write = SFTTrainer._save_rng_state
        SFTTrainer._save_rng_state = lambda self, folder: (
            kill() if self.state.global_step == step else write(self, folder)
        )
    elif moment == "adapter":  # the last step is done; the final folder is half written
        from glm4_helpers.runs import results

        results._keep_adapter_only = kill
    else:
        return [killing_callback(moment, step)]
    return []


def work(job: dict) -> None:
    os.environ["GLM4_HOME"] = job["home"]
    from glm4_helpers.profiles import get_profile
    from glm4_helpers.training import train_or_load

    profile = get_profile("glm4-nano", **job.get("overrides", {}))
    callbacks = arm(*job["kill"]) if job.get("kill") else []
    train_or_load(profile, tracking_mode=job.get("tracking", "disabled"), callbacks=callbacks)


def run_in_fork(job: dict) -> int:
    process = os.fork()
    if process == 0:
        try:
            work(job)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    import swanlab  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401

    import glm4_helpers.training  # noqa: F401  before forking, so that it is done once

    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    statuses = [run_in_fork(job) for job in jobs]
    Path(sys.argv[1]).with_suffix(".statuses").write_text(json.dumps(statuses))
