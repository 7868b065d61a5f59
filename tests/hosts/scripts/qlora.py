"""A plain `transformers.Trainer` script: LoRA on NF4 weights, random tokens. Usage: qlora.py OUTPUT_DIR."""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

if __name__ == "__main__":
    set_seed(0)
    output_dir = Path(sys.argv[1])
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(output_dir / "base")
    model = AutoModelForCausalLM.from_pretrained(
        output_dir / "base",
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, config.vocab_size, (16, 16), generator=generator)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(output_dir),
            max_steps=6,
            per_device_train_batch_size=2,
            learning_rate=2e-3,
            optim="adamw_8bit",
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row.clone()} for row in rows],
    )
    trainer.train()
    trainer.save_state()
    trainer.save_model()
