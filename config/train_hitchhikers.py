# An audiobook becomes a small model in its voice: some six hours, 50,000 to 60,000 words, 300 kB of text.
# python data/audio/prepare.py --input recordings/ --name hitchhikers --tokenizer=bpe:1024
# python train.py config/train_hitchhikers.py
# python sample.py --out_dir=out-hitchhikers --start= --num_samples=1 --speak=out.wav --voice=voice.onnx

out_dir = "out-hitchhikers"
dataset = "hitchhikers"
init_from = "auto"  # the same command goes on where it was interrupted

eval_interval = 100
eval_iters = 0  # all of val, each token once: it is a chapter or two
log_interval = 50
always_save_checkpoint = False  # ckpt.pt is the best so far: what comes after it was learned by heart

gradient_accumulation_steps = 1
batch_size = 4  # few tokens a step and many steps: larger ones learn less in the same time
block_size = 256  # with a vocabulary of 1,024, a hundred words or so
sampling = "epochs"  # each passage once before any a second time
n_layer = 4
n_head = 4
n_embd = 128  # 1.1 M parameters, four for each byte of the text: larger ones learn it by heart
dropout = 0.1  # the text is read nine times
max_iters = 1000

# the modern recipe, explained in train_shakespeare_cpu_modern.py
norm = "rmsnorm"
rotary = True
qk_norm = True
activation = "swiglu"
tied = False
logit_softcap = 15.0
embedding_skip = True
zero_init = True
optimizer = "muon"
muon_lr = 0.01
momentum = 0.9
learning_rate = 3e-3
weight_decay = 0.1
lr_schedule = "wsd"
cooldown = 0.5
min_lr = 0.0
warmup_iters = 0
