"""Trains with a script of this project or of another one, and measures loss and time on one clock.

    bench/timed_run.py JOB.json     # written and started by bench/time_to_loss.py

The script runs in this process, with its own loop, model, optimizer and data loader. What is
measured is attached from outside, through hooks of PyTorch, in the same way for every project:

    forward   update 1   forward   update 2 ... update n   evaluate   forward   update n + 1 ...
              |- - - - - - - - time - - - - - - - - - - -|            |- - - time - -

The clock starts at the end of the first update and stops while the model is evaluated. Start-up,
compilation, evaluation and whatever the script does after its last update are not counted; reading
batches, logging and everything else in the loop are. The first update counts as the mean of those
after it. Every project is evaluated by the same function on the same tokens, in float32.

The other projects' files are not changed. In the copy of a script that runs, these are replaced:
the seed 1337; and for build-nanogpt, which has no flags, the constants that the job names, the
dtype of its autocast, and its parts that evaluate and sample, which are left out.
"""

import sys
from pathlib import Path

# A study starts scripts by their path, and Python then looks for modules in bench/ only.
sys.path.insert(0, str(Path(__file__).parent.parent))

import ast
import json
import os
import runpy
import shutil
import time
from dataclasses import dataclass, field

import common.before_torch

import torch
import torch.nn as nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from common.console import UserError, errors_in_one_line, write_text
from common.runtime import Runtime
from common.scoring import stream_loss
from common.shards import open_shards

SEED = 1337  # the seed in nanoGPT's and build-nanogpt's scripts


@dataclass
class Job:
    script: str  # path of the training script
    flags: list[str]  # its command line
    cwd: str  # working directory of the script
    work: str  # folder that it writes to; removed afterwards
    curve: str  # file for the result
    data_dir: str  # folder of shards
    device: str
    seed: int
    steps: int  # updates of the run
    val_every: int  # updates between validation losses
    val_tokens: int
    B: int  # sequences per forward pass of an evaluation
    T: int
    is_ours: bool = False  # a script of this project, which runs as it is
    constants: dict[str, str] = field(default_factory=dict)  # name in the script -> new expression
    autocast: str | None = None  # dtype that replaces bfloat16; None = unchanged
    links: dict[str, str] = field(default_factory=dict)  # name in `work` -> folder it links to


def main(job: Job):
    work = Path(job.work)
    # An interrupted run starts from scratch: its clock can't be resumed.
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name, target in job.links.items():
        (work / name).symlink_to(target)
    if job.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # build-nanogpt takes a GPU if it sees one

    # The hooks are in place before the script makes its model.
    meter = Meter(job)
    sys.argv = [job.script, *job.flags]
    os.chdir(job.cwd)
    if job.is_ours:
        runpy.run_path(job.script, run_name="__main__")
    else:
        run_peer(job)
    meter.finish()
    # Leave the folder before it is removed.
    os.chdir(work.parent)
    shutil.rmtree(work)


# ---------------------------------------------------------------------------------------------
# Measuring


class Meter:
    """Counts and times updates, and evaluates the model, by hooks on the first model that runs."""

    def __init__(self, job: Job):
        self.job = job
        self.device = torch.device(job.device)
        self.val_tokens = open_shards(job.data_dir, "val").read_first(job.val_tokens + 1)
        self.points: list[dict] = []  # of the curve
        self.step = 0  # updates so far
        self.evaluated = 0  # the step of the last evaluation
        self.began = 0.0  # end of the first update
        self.updated = 0.0  # end of the last update
        self.paused = 0.0  # seconds since `began` that don't count
        self.optimizer: torch.optim.Optimizer | None = None
        register_optimizer_step_post_hook(self.after_update)
        self.first_forward = register_module_forward_pre_hook(self.find_model)

    def find_model(self, module: nn.Module, args: tuple):
        self.first_forward.remove()
        # torch.compile wraps the model; an evaluation would be compiled anew.
        self.model = getattr(module, "_orig_mod", module)
        module.register_forward_pre_hook(self.before_forward)

    def after_update(self, optimizer: torch.optim.Optimizer, *_):
        # A recipe may have two optimizers. One of them counts the updates.
        if self.optimizer is None:
            self.optimizer = optimizer
        self.step += optimizer is self.optimizer
        # Python runs ahead of a GPU.
        if self.device.type == "cuda" and (self.step == 1 or self.is_due()):
            torch.cuda.synchronize()
        self.updated = time.perf_counter()
        if self.step == 1:
            self.began = self.updated

    def is_due(self) -> bool:
        is_point = self.step % self.job.val_every == 0 or self.step == self.job.steps
        return is_point and self.step > self.evaluated

    def before_forward(self, *_):
        # The update is complete here; between two optimizers, it would not be.
        if self.is_due():
            self.evaluate()

    def evaluate(self):
        self.evaluated = self.step  # first, because evaluating is a forward pass, too
        # From the end of the first update to the end of this one, without evaluations: the time of
        # step - 1 updates.
        seconds = self.updated - self.began - self.paused
        model = LossOnly(self.model, self.job.script)
        rt = Runtime(self.device, torch.float32)
        # The hook runs inside the script's autocast, which would set the dtype of the evaluation.
        with torch.autocast(self.device.type, enabled=False):
            loss = stream_loss(model, self.val_tokens, self.job.B, self.job.T, rt)
        # The first update, which warms up, counts as the mean of the others.
        self.points.append(
            dict(step=self.step, loss=loss, seconds=seconds * self.step / (self.step - 1))
        )
        write_text(self.job.curve, json.dumps(self.points) + "\n")
        # The time since the last update is not training.
        self.paused += time.perf_counter() - self.updated

    def finish(self):
        if self.step != self.job.steps:
            raise UserError(
                f"{self.job.script} made {self.step} updates instead of {self.job.steps}: "
                "it is another version than this benchmark knows"
            )
        # No forward pass follows the last update.
        if self.is_due():
            self.evaluate()


class LossOnly:
    """A model of any project, as stream_loss calls it.

    The other projects' models return logits and loss. The validation tokens fill all windows, so
    no target is padding, which they would not know.
    """

    def __init__(self, model: nn.Module, source: str):
        self.model = model
        self.source = source
        self.training = model.training
        self.train = model.train
        self.eval = model.eval
        self.state_dict = model.state_dict

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result = self.model(x, y)
        return result[1] if isinstance(result, tuple) else result


# ---------------------------------------------------------------------------------------------
# The other projects' scripts


def run_peer(job: Job):
    """Run a script that has no `main`, as `python SCRIPT FLAGS` would."""
    # nanoGPT's script imports its own model.py, where this process already has ours.
    sys.modules.pop("model", None)
    sys.path.insert(0, str(Path(job.script).parent))
    # As the main program: nanoGPT's configurator changes the globals of the script that runs it.
    tree = adapt(Path(job.script), job.seed, job.constants, job.autocast)
    exec(compile(tree, job.script, "exec"), dict(__name__="__main__", __file__=job.script))


def adapt(path: Path, seed: int, constants: dict[str, str], autocast: str | None) -> ast.Module:
    """The script with another seed and other constants.

    Raises UserError if the script lacks one of them.
    """
    adapter = Adapter(seed, constants, autocast)
    tree = ast.fix_missing_locations(adapter.visit(ast.parse(path.read_text("utf-8"))))
    missing = {"the seed", *constants} - adapter.found
    if missing:
        raise UserError(
            f"{path} has no {', '.join(sorted(missing))}: it is another version than this "
            "benchmark knows"
        )
    return tree


class Adapter(ast.NodeTransformer):
    """Replaces what `timed_run.py` lists, outside of functions and classes."""

    def __init__(self, seed: int, constants: dict[str, str], autocast: str | None):
        self.seed = seed
        self.constants = constants
        self.autocast = autocast
        self.found: set[str] = set()

    # Not visiting the children of a node leaves them unchanged.
    def visit_FunctionDef(self, node: ast.FunctionDef):
        return node

    def visit_ClassDef(self, node: ast.ClassDef):
        return node

    def visit_Constant(self, node: ast.Constant):
        if node.value == SEED:
            self.found.add("the seed")
            return ast.Constant(self.seed)
        return node

    def visit_Assign(self, node: ast.Assign):
        target = node.targets[0]
        # Only the first assignment: later ones wrap the model, or compute with the value.
        if isinstance(target, ast.Name) and target.id in self.constants.keys() - self.found:
            self.found.add(target.id)
            node.value = ast.parse(self.constants[target.id], mode="eval").body
            return node
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute):
        if self.autocast and node.attr == "bfloat16":
            node.attr = self.autocast
        return self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom):
        # HellaSwag is left out, and its module would need packages of its own.
        return None if node.module == "hellaswag" else node

    def visit_If(self, node: ast.If):
        # build-nanogpt evaluates and samples every few hundred steps, and after the last one.
        names = {part.id for part in ast.walk(node.test) if isinstance(part, ast.Name)}
        return None if "last_step" in names else self.generic_visit(node)


if __name__ == "__main__":
    with errors_in_one_line():
        main(Job(**json.loads(Path(sys.argv[1]).read_text())))
