"""Trains a small GPT, letter by letter, on the text of Python's own reference, which Python brings along (pydoc_data).

    fleet run --workers 2 examples/gpt.py fleet

Plain torch: the word is the backend, and without one it is torch's own choice. The same script runs under torchrun.
"""

import sys
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

CONTEXT, ROWS, STEPS = 64, 16, 100


class GPT(nn.Module):
    """Transformer that foretells, at each place of a text, the next letter. Letters are numbers below `letters`."""

    def __init__(self, letters: int, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(letters, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, letters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: int64 (rows, length); returns float32 (rows, length, letters)."""
        length = x.shape[1]
        later = nn.Transformer.generate_square_subsequent_mask(length)
        found = self.blocks(self.letters(x) + self.places(torch.arange(length)), mask=later, is_causal=True)
        return self.head(found)


def encoded_text() -> tuple[torch.Tensor, str]:
    """The text as numbers of letters, and the letters."""
    text = "\n".join(topics[name] for name in sorted(topics))
    letters = "".join(sorted(set(text)))
    number_of = {letter: number for number, letter in enumerate(letters)}
    return torch.tensor([number_of[letter] for letter in text]), letters


def batch(text: torch.Tensor, rows: int, context: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces of the text and, for each of their letters, the next one: both (rows, context)."""
    starts = torch.randint(len(text) - context - 1, (rows,), generator=draw)
    pieces = torch.stack([text[start : start + context + 1] for start in starts])
    return pieces[:, :-1], pieces[:, 1:]


def main() -> None:
    dist.init_process_group(*sys.argv[1:2])
    rank, world_size = dist.get_rank(), dist.get_world_size()
    text, letters = encoded_text()
    torch.manual_seed(7)
    model = DistributedDataParallel(GPT(len(letters), 64, 2, CONTEXT))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    draw = torch.Generator().manual_seed(rank)  # each rank reads other pieces
    for step in range(STEPS):
        x, y = batch(text, ROWS, CONTEXT, draw)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            mean = loss.detach() / world_size
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step + 1}  loss {mean.item():.3f}")
    if rank == 0:
        said = text[:CONTEXT].tolist()
        with torch.no_grad():
            for _ in range(CONTEXT):
                likely = model.module(torch.tensor([said[-CONTEXT:]]))[0, -1].softmax(0)
                said.append(int(torch.multinomial(likely, 1, generator=draw)))
        written = "".join(letters[number] for number in said)
        print(f"{written[:CONTEXT]!r} goes on as {written[CONTEXT:]!r}, on {dist.get_backend()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
