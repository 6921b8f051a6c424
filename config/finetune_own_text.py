# GPT-2 learns to write like you: it knows English already, and takes on your subjects and your tone.
# It needs GPT-2's weights (0.5 GB, from the hub, or a folder) and a GPU, or some patience.
# python data/text/prepare.py --input mybook.txt --name mybook --tokenizer=gpt2
# python train.py config/finetune_own_text.py --dataset=mybook --out_dir=out-mybook-gpt2

out_dir = "out-own-text-gpt2"
dataset = "mybook"
init_from = "auto:gpt2"  # the same command resumes an interrupted run; gpt2-medium and larger know more
eval_interval = 20
eval_iters = 20
log_interval = 1
always_save_checkpoint = False  # it overfits soon: keep the best on val

# 8 sequences of 1,024 tokens a step; if memory is short, batch_size=1 and twice the micro-steps
batch_size = 2
gradient_accumulation_steps = 4
block_size = 1024
sampling = "epochs"
max_iters = 200  # 1.6 million tokens; the best checkpoint is kept, however often that is your text

learning_rate = 3e-5  # a twentieth of pretraining's: the weights are nearly right
decay_lr = False
dropout = 0.1
