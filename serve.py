"""Serve a trained GPT as a web page and an OpenAI-compatible API: python serve.py --out_dir=out-addition"""

from configurator import configure
from distrogpt.settings import ServeConfig

if __name__ == "__main__":
    CONFIG = configure(ServeConfig)  # before torch is loaded, so that --help and mistakes answer at once

import signal
import threading

from distrogpt.audio.speech import load_voice
from distrogpt.errors import MachineError, UserError, cli_errors, exit_process, path_from_here, warn
from distrogpt.inference.sampler import Sampler

with cli_errors("lower --batch_size"):
    try:
        from distrogpt.serving.app import App, find_key, listen
        from distrogpt.serving.engine import Engine
        from distrogpt.serving.server import Server
    except ModuleNotFoundError as error:
        path = path_from_here("requirements-serve.txt")
        raise UserError(f"serve.py needs {error.name}; run: pip install -r {path}") from None


def main(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM. Raises UserError and MachineError."""
    key, signals = find_key(config), []
    voice = load_voice(config.voice) if config.voice else None
    with listen(config.host, config.port) as address:
        source, hardware = (config.out_dir, config.init_from), (config.device, config.dtype)
        sampler = Sampler(*source, *hardware, int8=config.int8, dataset=config.dataset)
        engine = Engine(sampler, config.batch_size, config.queue)
        server = Server(App(config, sampler, engine, key, voice))
        host, port = address.getsockname()[:2]
        warn(f"{sampler.source} ({sampler.runtime.describe()})")

        def stop(number: int, frame: object) -> None:
            server.force_exit = bool(signals)
            signals.append(number)
            engine.close()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C stops the server)", flush=True)
        # The engine runs in this thread, which loaded the model. OpenMP starts workers for each thread that
        # computes; with those of a second thread, decoding takes three times as long.
        http = threading.Thread(target=server.run, args=([address],))
        http.start()
        engine.run()  # until it is closed and all clients have a response
        server.should_exit = True
        http.join()
    if not signals:
        raise MachineError("out of memory; lower --batch_size")
    exit_process(128 + signals[0])


if __name__ == "__main__":
    with cli_errors("lower --batch_size"):
        main(CONFIG)
