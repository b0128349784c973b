"Pacing and token counts for contenders that use the Trainer of transformers."

from pathlib import Path

from pacing import Channel, Pacer
from transformers import PreTrainedModel, TrainerCallback


class TokenCount:
    "Counts the input tokens of a model, and the real ones among them."

    def __init__(self, model: PreTrainedModel):
        self.real = self.computed = 0  # `real` becomes a tensor, so that counting does not synchronize with a GPU
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
    "Return the pacer of a run of the Trainer."

    def save(folder: Path) -> None:
        model.save_pretrained(folder)

    return Pacer(channel, job, TokenCount(model).totals, save)
