"""The Hugging Face Trainer as its users write it, on a tiny GPT made here: `client_trainer.py RESULT [BACKEND]`."""

from __future__ import annotations

import sys

import torch
from torch import distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from tests.frameworks.result import write


def main(result: str, backend: str | None = None) -> None:
    if backend:
        dist.init_process_group(backend)  # Trainer takes the process group that is there
    set_seed(1)
    words = torch.randint(0, 64, (48, 12))
    data = [{"input_ids": row, "labels": row} for row in words]
    config = GPT2Config(
        vocab_size=64,
        n_positions=12,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=TrainingArguments(
            output_dir=f"{result}.output",
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            learning_rate=0.01,
            logging_steps=2,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=data,
        eval_dataset=data[:10],
    )
    trained = trainer.train()
    evaluated = trainer.evaluate()
    write(result, trainer.model, {"loss": trained.training_loss, "eval_loss": evaluated["eval_loss"]})


if __name__ == "__main__":
    main(*sys.argv[1:])
