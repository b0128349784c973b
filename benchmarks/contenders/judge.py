"""Compute the masked loss of saved models on held-out lines, with stock transformers.

Every model sees the same lines, one per row, truncated at max_length, and the same masks, which are drawn once from a
seed: 15% of the tokens, of which 80% become `<mask>`, 10% a random token, and 10% stay.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from pacing import Channel, Stop, serve
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

ROWS_PER_BATCH = 32


def make_batches(job: dict) -> list[dict[str, torch.Tensor]]:
    "Return the held-out lines as masked, padded batches of similar length."
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    lines = Path(job["text"]).read_text(encoding="utf-8").split("\n")
    lines = sorted((line for line in lines if line.strip()), key=lambda line: (len(line), line))
    generator, batches = torch.Generator().manual_seed(job["seed"]), []
    for start in range(0, len(lines), ROWS_PER_BATCH):
        batch = tokenizer(
            lines[start : start + ROWS_PER_BATCH],
            truncation=True,
            max_length=job["max_length"],
            padding=True,
            return_tensors="pt",
        )
        ids = batch["input_ids"]
        maskable = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        draw, kind = torch.rand(ids.shape, generator=generator), torch.rand(ids.shape, generator=generator)
        random_tokens = torch.randint(len(tokenizer), ids.shape, generator=generator)
        predicted = maskable & (draw < job["mlm_probability"])
        corrupted = torch.where(predicted & (kind < 0.8), tokenizer.mask_token_id, ids)
        corrupted = torch.where(predicted & (kind >= 0.8) & (kind < 0.9), random_tokens, corrupted)
        labels = ids.masked_fill(~predicted, -100)
        batches.append({"input_ids": corrupted, "attention_mask": batch["attention_mask"], "labels": labels})
    return batches


@torch.inference_mode()
def masked_loss(model: PreTrainedModel, batches: list[dict], device: str) -> tuple[float, int]:
    "Return the mean loss in nats over all masked tokens, and their number."
    total = predictions = 0
    for batch in batches:
        logits = model(
            input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
        ).logits
        labels = batch["labels"].to(device)
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"))
        predictions += int((labels != -100).sum())
    return total / predictions, predictions


def judge(channel: Channel, job: dict) -> None:
    "Send the loss of one folder after the other."
    batches = make_batches(job)
    channel.send(ready=True)
    while (command := channel.receive())["do"] != "stop":
        model = AutoModelForMaskedLM.from_pretrained(command["folder"]).eval().to(job["device"])
        loss, predictions = masked_loss(model, batches, job["device"])
        channel.send(loss=loss, predictions=predictions)
    raise Stop


if __name__ == "__main__":
    serve({"judge": judge})
