# Finetune GPT-2 on your own text: it already knows English, and learns your subjects and your tone.
# It needs GPT-2's weights (0.5 GB, from the Hugging Face hub or a folder). A GPU is recommended.
# python data/text/prepare.py --input mybook.txt --name mybook --tokenizer=gpt2
# python train.py config/finetune_own_text.py --dataset=mybook --out_dir=out-mybook-gpt2

out_dir = "out-own-text-gpt2"
dataset = "mybook"
init_from = "auto:gpt2"  # run the same command again to resume; gpt2-medium and larger know more
eval_interval = 20
eval_iters = 20
log_interval = 1
always_save_checkpoint = False  # it overfits soon: keep the checkpoint with the lowest val loss

# 8 sequences of 1,024 tokens per step. If memory is short: batch_size=1, gradient_accumulation_steps=8
batch_size = 2
gradient_accumulation_steps = 4
block_size = 1024
sampling = "epochs"
max_iters = 200  # 1.6 million tokens, however many epochs of your text that is

learning_rate = 3e-5  # a twentieth of the rate of pretraining
decay_lr = False
dropout = 0.1
