"""A bad line: ``python relay.py PORT HOST PORT DELAY CUT SEED`` passes bytes on late, and at times
cuts the connection.

What packet loss does to TCP is to stall and to break it. DELAY: seconds added to each way; CUT:
chance that a chunk breaks its connection instead of arriving.
"""

from __future__ import annotations

import asyncio
import random
import sys


async def main(port: int, host: str, there: int, delay: float, cut: float, seed: int) -> None:
    draw = random.Random(seed)
    cuts = 0

    async def pump(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, other: asyncio.StreamWriter
    ) -> None:
        nonlocal cuts
        try:
            while data := await reader.read(65536):
                await asyncio.sleep(delay)
                if draw.random() < cut:
                    cuts += 1
                    print(f"cut {cuts}", flush=True)
                    break
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()
            other.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            onward, back = await asyncio.open_connection(host, there)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, back, writer), pump(onward, writer, back))

    async with await asyncio.start_server(accept, "127.0.0.1", port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    values = sys.argv[1:]
    asyncio.run(
        main(
            int(values[0]),
            values[1],
            int(values[2]),
            float(values[3]),
            float(values[4]),
            int(values[5]),
        )
    )
