"""What the authors of RoundPipe measured, as data: tokens a second and longest sequences on real cards.

Columns: Qwen3-1.7B, Llama-3.1-8B, GPT-OSS-20B, Qwen3-32B, and Qwen3-235B with a LoRA adapter; sequences of 2048. None:
out of memory, or not measured. The A800 figure of 235B is 2,132 here and 1,796 in the artifact's README.
Source: ITcarrot/RoundPipe-artifact, exp/raw-data.csv and theoretical-analysis/OI.py at commit e44270a (MIT licence),
beside arXiv 2604.27085.
"""

from collections.abc import Mapping

MODELS = ("Qwen3-1.7B", "Llama-3.1-8B", "GPT-OSS-20B", "Qwen3-32B", "Qwen3-235B")
Row = tuple[float | None, ...]
OURS = ("RoundPipe", "RoundPipe-sync")

TOKENS_4090 = {  # eight cards, tokens a second
    "ZeRO-2": (10170.99, None, None, None, None), "ZeRO-Infinity": (7035.23, 1843.39, 645.51, 217.82, None),
    "FSDP": (13277.07, 1923.77, None, None, None), "Megatron-PP": (39081.21, 16412.18, None, None, None),
    "Megatron-TP": (2132.1, 920.81, None, None, None), "Mobius": (39370.22, 11288.46, 8405.36, 2551.63, None),
    "RoundPipe": (65416.83, 24274.54, 18121.59, 5516.22, 1819.61),
    "RoundPipe-sync": (56489.04, 18888.43, 12549.3, 4163.62, 1592.46)}
TOKENS_A800 = {
    "ZeRO-2": (75587.93, 24606.95, None, None, None), "ZeRO-Infinity": (64851.21, 18616.11, 9993.91, 3399.28, 1094.52),
    "FSDP": (85829.26, 29148.46, 20682.27, 3454.77, None), "Megatron-PP": (52356.8, 23672.01, 21350.91, None, 986.17),
    "Megatron-TP": (48546.63, 17939.76, 22935.31, 4276.46, None),
    "RoundPipe": (84691.82, 28427.01, 26202.55, 6301.19, 2132.29),
    "RoundPipe-sync": (66242.79, 22702.59, 15611.54, 5179.61, 1680.41)}
LENGTHS_4090 = {  # longest sequence at batch 1, thousands of tokens
    "ZeRO-2": (7, None, None, None, None), "ZeRO-Infinity": (9, 9, 6, 6, None), "FSDP": (10, 5, None, None, None),
    "Megatron-PP": (9, 5, None, None, None), "Megatron-TP": (62, 20, None, None, None),
    "Mobius": (9, 9, 6, 6, None), "RoundPipe": (73, 49, 39, 28, 31)}
SCALING = {  # RoundPipe on 1 to 8 RTX 4090, tokens a second
    "Qwen3-1.7B": (8880.99, 17025.55, 25702.44, 33178.39, 42026.2, 48829.86, 57598.61, 65416.83),
    "Llama-3.1-8B": (3142.17, 6259.09, 9221.6, 12277.77, 15342.93, 18363.22, 21296.67, 24274.54),
    "GPT-OSS-20B": (3021.89, 5591.79, 8016.41, 9670.3, 12530.59, 14926.34, 16522.61, 18121.59),
    "Qwen3-32B": (740.46, 1476.11, 2203.82, 2897.08, 3599.81, 4290.25, 4913.34, 5516.22),
    "Qwen3-235B": (480.3, 807.87, 1088.4, 1281.49, 1509.48, 1635.75, 1742.93, 1819.61)}
WIDTHS = {  # width, key heads / heads, feed-forward width, experts that are active, experts
    "Qwen3-1.7B": (2048, 8 / 16, 6144, 1, 1), "Llama-3.1-8B": (4096, 8 / 32, 14336, 1, 1),
    "GPT-OSS-20B": (2880, 8 / 64, 2880, 4, 32), "Qwen3-32B": (5120, 8 / 64, 25600, 1, 1),
    "Qwen3-235B": (4096, 4 / 64, 1536, 8, 128)}


def gain(table: Mapping[str, Row], system: str, leave_out: tuple[str, ...] = ()) -> dict[str, float]:
    """`system` against the best of all rivals but some, by model; models that no rival can train are left out."""
    gains = {}
    for place, model in enumerate(MODELS):
        rivals = [row[place] for name, row in table.items() if name not in (*OURS, *leave_out) and row[place]]
        if rivals and table[system][place]:
            gains[model] = table[system][place] / max(rivals)
    return gains
