"""Fine-tune every weight of a causal language model on conversations, with the plain transformers Trainer.

    python examples/trainer_full.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset trl-lib/Capybara

A dataset is a name on the Hub or a JSON-lines file of `{"messages": [{"role": "user", "content": "..."}, ...]}`.
"""

import argparse
import os

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="name on the Hub, or a folder")
    parser.add_argument("--dataset", default="trl-lib/Capybara", help="name on the Hub, or a .jsonl file")
    parser.add_argument("--output-dir", default="trainer-full")
    parser.add_argument("--max-steps", type=int, default=-1, help="-1: a whole epoch")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--logging-steps", type=int, default=1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    return parser.parse_args()


def main() -> None:
    args = parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)

    if os.path.isfile(args.dataset):
        dataset = load_dataset("json", data_files=args.dataset, split="train")
    else:
        dataset = load_dataset(args.dataset, split="train")

    def tokenize(example):
        text = tokenizer.apply_chat_template(example["messages"], tokenize=False)
        return tokenizer(text, truncation=True, max_length=args.max_length, add_special_tokens=False)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            gradient_checkpointing=args.gradient_checkpointing,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            logging_steps=args.logging_steps,
            bf16=args.dtype == "bfloat16",
            use_cpu=args.cpu,
            disable_tqdm=not args.progress,
            seed=args.seed,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=dataset.map(tokenize, remove_columns=dataset.column_names),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    metrics = trainer.train().metrics
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    trainer.save_model()


if __name__ == "__main__":
    main()
