"""A plain `transformers.Trainer` script: causal language modelling on random tokens. Usage: trainer.py OUTPUT_DIR."""

import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed


class RandomTokens(torch.utils.data.Dataset):
    def __init__(self, size, length, vocab_size):
        generator = torch.Generator().manual_seed(0)
        self.input_ids = torch.randint(0, vocab_size, (size, length), generator=generator)

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, index):
        return {"input_ids": self.input_ids[index], "labels": self.input_ids[index].clone()}


if __name__ == "__main__":
    set_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    arguments = TrainingArguments(
        output_dir=sys.argv[1],
        max_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=RandomTokens(16, 16, config.vocab_size))
    trainer.train()
    # At the end of a process gloo's threads must hold no tensors of Python any more, or it aborts now and then, with
    # and without hf_turbo (pytorch/pytorch#179291, #190489). The pause lets them finish with the last collective.
    time.sleep(1)
    trainer.accelerator.end_training()
