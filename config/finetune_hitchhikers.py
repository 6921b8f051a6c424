# GPT-2 learns to write as an audiobook sounds: some six hours, 300 kB of text, 75,000 of its tokens.
# It needs GPT-2's weights (0.5 GB, from the hub, or a folder) and a GPU, or some patience.
# python data/audio/prepare.py --input recordings/ --name hitchhikers --tokenizer=gpt2
# python train.py config/finetune_hitchhikers.py
# python sample.py --out_dir=out-hitchhikers --start= --num_samples=1 --speak=out.wav --voice=voice.onnx

out_dir = "out-hitchhikers"
dataset = "hitchhikers"
init_from = "auto:gpt2"  # the same command goes on where it was interrupted; gpt2-medium and larger know more

eval_interval = 10  # about once in each reading of the text
eval_iters = 0  # all of val, each token once: it is a chapter or two
log_interval = 1
always_save_checkpoint = False  # it overfits soon: keep the best on val
patience = 3  # evaluations without a lower val loss: a book is learned by heart in few readings

# 16 sequences of 512 tokens a step, so that an epoch is 9 steps; where memory is short, batch_size=1
batch_size = 4
gradient_accumulation_steps = 4
block_size = 512  # two or three minutes of speech; val must be longer
sampling = "epochs"
max_iters = 100  # eleven readings at most

learning_rate = 3e-5  # a twentieth of pretraining's: the weights are nearly right
decay_lr = False
dropout = 0.1
