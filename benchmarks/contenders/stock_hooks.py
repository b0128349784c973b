"How the contenders that train with the Trainer of transformers are paced and counted."

from pathlib import Path

from pacing import Channel, Pacer
from transformers import PreTrainedModel, TrainerCallback


class TokenCount:
    "Counts the tokens that go into a model, and how many of them are real."

    def __init__(self, model: PreTrainedModel):
        self.real = self.computed = 0  # `real` becomes a tensor, so that a GPU need not stop to count
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, arguments: tuple, named: dict) -> None:
        self.computed += named["input_ids"].numel()
        self.real = self.real + named["attention_mask"].sum()

    def totals(self) -> tuple[int, int]:
        return int(self.real), self.computed


class StepHook(TrainerCallback):
    "Sleeps at the end of a step while another contender has its round."

    def __init__(self, pacer: Pacer):
        self.pacer = pacer

    def on_step_end(self, args, state, control, **kwargs):
        self.pacer.step_done()


def make_pacer(channel: Channel, job: dict, model: PreTrainedModel) -> Pacer:
    "The pacer of a run of the Trainer."

    def save(folder: Path) -> None:
        model.save_pretrained(folder)

    return Pacer(channel, job, TokenCount(model).totals, save)
