# For training on GPUs, on a machine with the NVIDIA Container Toolkit:
#   docker build -t distrogpt .
#   docker run --rm -it --gpus all --shm-size=8g -v "$PWD/data:/distrogpt/data" -v "$PWD/out:/distrogpt/out" \
#       distrogpt train.py config/train_shakespeare_char.py --out_dir=out/shakespeare
# On several GPUs: --entrypoint torchrun distrogpt --standalone --nproc_per_node=8 train.py config/train_gpt2.py
FROM python:3.12-slim

# torch.compile needs a C++ compiler; torch includes the CUDA libraries
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /distrogpt
COPY requirements.txt requirements-serve.txt constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt -r requirements.txt -r requirements-serve.txt
COPY . .

ENTRYPOINT ["python"]
CMD ["train.py", "--help"]
