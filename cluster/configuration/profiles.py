"""Built-in populations of devices: published figures, each with its source.

A profile is what ``devices.tiers`` would say. Figures are medians of a tier; ``spread`` draws each device
around them. FLOP/s are what training reaches, not peaks.

Sources:
    [1] Das, Kwon, Chauhan, Mascolo, "Enabling On-Device Smartphone GPU based Training: Lessons Learned",
        2022, arXiv 2202.10100: training kernels on Snapdragon 8 phones reach 15-30 GFLOP/s on the CPU and,
        tuned, 40-70 GFLOP/s on the GPU.
    [2] Feiereisen, "Benchmarking the Raspberry Pi 4 with Raspberry Pi OS64", 2022: High Performance Linpack
        on its four Cortex-A72 cores, which are those of low-end phones too, 8 GFLOP/s.
    [3] Ookla, Speedtest Global Index, September 2020, means of the world: mobile 35.96 Mbit/s down, 11.22 up,
        40 ms; fixed broadband 85.73 down, 45.74 up, 21 ms.
    [4] Ookla, "Growing and Slowing: The State of 5G Worldwide in 2021": 5G medians of the world in Q3 2021,
        166.13 Mbit/s down, 21.08 up.
    [5] Ookla, Market Reports Q1 2023: mobile medians at the low end, 14.46 Mbit/s down (MTN, Cameroon).
    [6] NVIDIA, Jetson module data sheets: Jetson Nano 472 GFLOP/s (float16, so 236 in float32), 4 GB; Jetson
        Xavier NX, 384 Volta cores at 1.1 GHz, 845 GFLOP/s in float32, 8 GB. A third of the peak is assumed.
    [7] Bonawitz et al., "Towards Federated Learning at Scale: System Design", SysML 2019, arXiv 1902.01046:
        6 % to 10 % of the devices drop out of a round; four times more take part at the height of the day's
        cycle than at its bottom.

Shares, memory (half of a device's RAM is left to training) and spreads are plain assumptions.
"""

from __future__ import annotations

from typing import Any

_DIURNAL = {"name": "diurnal", "low": 0.2, "high": 0.8}  # a factor of four [7]

PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    # All alike, always there, never lost: a mid-range phone.
    "uniform": {
        "device": {"share": 1.0, "compute": 22.5e9, "memory": 3e9, "uplink": 11.22e6, "downlink": 35.96e6,
                   "latency": 0.04},
    },
    "phones": {
        # CPU of [2]; downlink of [5], uplink in the proportion of [3]; dropout at the upper end of [7].
        "low": {"share": 0.3, "compute": 8e9, "memory": 1.5e9, "uplink": 4.51e6, "downlink": 14.46e6,
                "latency": 0.1, "dropout": 0.1, "spread": 0.5, "availability": _DIURNAL},
        # Middle of the CPUs in [1]; network of [3].
        "mid": {"share": 0.5, "compute": 22.5e9, "memory": 3e9, "uplink": 11.22e6, "downlink": 35.96e6,
                "latency": 0.04, "dropout": 0.08, "spread": 0.5, "availability": _DIURNAL},
        # Middle of the GPUs in [1]; network of [4].
        "high": {"share": 0.2, "compute": 55e9, "memory": 6e9, "uplink": 21.08e6, "downlink": 166.13e6,
                 "latency": 0.03, "dropout": 0.06, "spread": 0.5, "availability": _DIURNAL},
    },
    "edge-boxes": {
        # Always on, at fixed broadband of [3].
        "raspberry-pi-4": {"share": 0.5, "compute": 8e9, "memory": 2e9, "uplink": 45.74e6,
                           "downlink": 85.73e6, "latency": 0.021, "dropout": 0.01, "spread": 0.2},
        "jetson-nano": {"share": 0.3, "compute": 79e9, "memory": 2e9, "uplink": 45.74e6, "downlink": 85.73e6,
                        "latency": 0.021, "dropout": 0.01, "spread": 0.2},
        "jetson-xavier-nx": {"share": 0.2, "compute": 282e9, "memory": 4e9, "uplink": 45.74e6,
                             "downlink": 85.73e6, "latency": 0.021, "dropout": 0.01, "spread": 0.2},
    },
}  # fmt: skip
