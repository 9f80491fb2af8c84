"""Built-in populations of devices: published figures, each with its source.

A profile is what ``devices.tiers`` would say. Figures are medians of a tier; ``spread`` draws each device
around them. FLOP/s are what training reaches, not peaks. Energy is joules a FLOP and joules a byte: watts
over FLOP/s, and watts of the radio over the tier's own bit/s.

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
    [8] Huang, Qian, Gerber, Mao, Sen, Spatscheck, "A Close Examination of Performance and Power
        Characteristics of 4G LTE Networks", MobiSys 2012, power model: a radio busy at r Mbit/s draws
        a r + b milliwatts; LTE a = 438.39 up and 51.97 down, b = 1288.04; Wi-Fi a = 283.17 up and 137.01
        down, b = 132.86.
    [9] Kim and Wu, "AutoFL: Enabling Heterogeneity-Aware Energy Efficient Federated Learning", MICRO 2021,
        arXiv 2107.08147, table of phones, at their peaks: CPU 3.6 W at the low end (Moto X Force) and 5.6 W
        in the middle (Galaxy S10e), GPU 2.8 W at the high end (Mi8Pro).
    [10] NVIDIA, the same data sheets, power budgets: Jetson Nano 10 W, Jetson Xavier NX 15 W.
    [11] Geerling, Raspberry Pi Dramble, power consumption benchmarks: a Raspberry Pi 4 draws 6.4 W with all
        four cores busy.

Shares, memory (half of a device's RAM is left to training) and spreads are plain assumptions. So are, of
energy: that a device draws the watts of [9] to [11] while it reaches the FLOP/s above, and a faster one of
its tier in proportion more; that a bit takes the radios of today what it took those of 2012, 5G what LTE
does; that boxes are on Wi-Fi. The screen, waiting, and a radio's tail after a transfer are not counted. The
figures of [8] to [10] were not compared with the sources themselves: do so before you publish joules.
"""

from __future__ import annotations

from typing import Any

_DIURNAL = {"name": "diurnal", "low": 0.2, "high": 0.8}  # a factor of four [7]

PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    # All alike, always there, never lost: a mid-range phone.
    "uniform": {
        "device": {"share": 1.0, "compute": 22.5e9, "memory": 3e9, "uplink": 11.22e6, "downlink": 35.96e6,
                   "latency": 0.04, "flop_energy": 2.49e-10, "uplink_energy": 4.43e-6,
                   "downlink_energy": 7.02e-7},
    },
    "phones": {
        # CPU of [2]; downlink of [5], uplink in the proportion of [3]; dropout at the upper end of [7].
        # Energy of all phones: LTE of [8], CPU or GPU of [9].
        "low": {"share": 0.3, "compute": 8e9, "memory": 1.5e9, "uplink": 4.51e6, "downlink": 14.46e6,
                "flop_energy": 4.5e-10, "uplink_energy": 5.79e-6, "downlink_energy": 1.13e-6,
                "latency": 0.1, "dropout": 0.1, "spread": 0.5, "availability": _DIURNAL},
        # Middle of the CPUs in [1]; network of [3].
        "mid": {"share": 0.5, "compute": 22.5e9, "memory": 3e9, "uplink": 11.22e6, "downlink": 35.96e6,
                "flop_energy": 2.49e-10, "uplink_energy": 4.43e-6, "downlink_energy": 7.02e-7,
                "latency": 0.04, "dropout": 0.08, "spread": 0.5, "availability": _DIURNAL},
        # Middle of the GPUs in [1]; network of [4].
        "high": {"share": 0.2, "compute": 55e9, "memory": 6e9, "uplink": 21.08e6, "downlink": 166.13e6,
                 "flop_energy": 5.09e-11, "uplink_energy": 4.0e-6, "downlink_energy": 4.78e-7,
                 "latency": 0.03, "dropout": 0.06, "spread": 0.5, "availability": _DIURNAL},
    },
    "edge-boxes": {
        # Always on, at fixed broadband of [3], over the Wi-Fi of [8]; watts of [10] and [11].
        "raspberry-pi-4": {"share": 0.5, "compute": 8e9, "memory": 2e9, "uplink": 45.74e6,
                           "downlink": 85.73e6, "flop_energy": 8.0e-10,
                           "uplink_energy": 2.29e-6, "downlink_energy": 1.11e-6,
                           "latency": 0.021, "dropout": 0.01, "spread": 0.2},
        "jetson-nano": {"share": 0.3, "compute": 79e9, "memory": 2e9, "uplink": 45.74e6, "downlink": 85.73e6,
                        "flop_energy": 1.27e-10, "uplink_energy": 2.29e-6, "downlink_energy": 1.11e-6,
                        "latency": 0.021, "dropout": 0.01, "spread": 0.2},
        "jetson-xavier-nx": {"share": 0.2, "compute": 282e9, "memory": 4e9, "uplink": 45.74e6,
                             "downlink": 85.73e6, "flop_energy": 5.32e-11,
                             "uplink_energy": 2.29e-6, "downlink_energy": 1.11e-6,
                             "latency": 0.021, "dropout": 0.01, "spread": 0.2},
    },
}  # fmt: skip
