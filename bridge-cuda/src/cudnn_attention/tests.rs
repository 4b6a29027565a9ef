//! Plans for an H100 that need not be there: cuDNN makes plans for a device described by its properties. That takes the
//! driver's library, though no GPU; without it, only the graphs are checked.

use super::*;
use crate::cudnn::{attribute, kind, value};
use crate::library::Library;

/// What cuDNN reports of an H100.
const H100: &str = r#"{"deviceName":"NVIDIA H100 80GB HBM3","cudaDeviceId":0,"deviceVer":900,"driverVer":13000,
"maxGridSize":[2147483647,65535,65535],"maxBlockSize":[1024,1024,64],"regsPerBlock":65536,"multiProcessorCount":132,
"smClockRateKHz":1980000,"memClockRateKHz":2619000,"l2CacheSize":52428800,"warpSize":32,"maxSharedMemoryPerBlock":49152,
"maxSharedMemoryPerBlockOptin":232448,"reservedSharedMemoryPerBlock":1024,"maxRegistersPerSM":65536,"pciDeviceId":0,
"maxCtasPerSM":32,"maxThreadsPerBlock":1024,"maxThreadsPerSM":2048,"isTccDriver":0,"supportCoopLaunch":1,
"totalGlobalMem":85029158912}"#;

fn causal(
    batch: i64,
    [queries, keys]: [i64; 2],
    [heads, key_heads]: [i64; 2],
    [d, dv]: [i64; 2],
) -> Problem {
    let strides = |rows, heads, d| [rows * heads * d, heads * d, d];
    Problem {
        element: Element::BF16,
        batch,
        queries,
        keys,
        heads,
        key_heads,
        d,
        dv,
        q: strides(queries, heads, d),
        k: strides(keys, key_heads, d),
        v: strides(keys, key_heads, dv),
        scale: 0.125f32.to_bits(),
        softcap: None,
        last: Some(0),
        first: None,
        sinks: false,
        packed: false,
    }
}

/// Problems that models pose, by name.
fn problems() -> Vec<(&'static str, Problem)> {
    let small = causal(2, [512, 512], [8, 2], [64, 64]);
    let wide = causal(2, [512, 512], [8, 2], [128, 128]);
    vec![
        ("b4 s2048 h32 d64", causal(4, [2048; 2], [32, 32], [64; 2])),
        (
            "b1 s8192 h32/8 d128",
            causal(1, [8192; 2], [32, 8], [128; 2]),
        ),
        (
            "f16",
            Problem {
                element: Element::F16,
                ..small
            },
        ),
        ("d80", causal(2, [512; 2], [8, 8], [80; 2])),
        ("d256", causal(2, [512; 2], [8, 2], [256; 2])),
        ("d192 dv128", causal(2, [512; 2], [8, 8], [192, 128])),
        ("odd lengths", causal(1, [321; 2], [3, 1], [64; 2])),
        (
            "bidirectional",
            Problem {
                last: None,
                ..causal(1, [130, 77], [2, 2], [64; 2])
            },
        ),
        (
            "cache",
            Problem {
                last: Some(200),
                ..causal(2, [100, 300], [8, 2], [64; 2])
            },
        ),
        (
            "window",
            Problem {
                first: Some(100),
                ..wide
            },
        ),
        (
            "window both ways",
            Problem {
                last: Some(99),
                first: Some(100),
                ..small
            },
        ),
        (
            "window, cache",
            Problem {
                last: Some(200),
                first: Some(-100),
                ..causal(2, [100, 300], [8, 2], [64; 2])
            },
        ),
        (
            "softcap, window",
            Problem {
                softcap: Some(50.0f32.to_bits()),
                first: Some(100),
                ..causal(2, [512; 2], [8, 2], [256; 2])
            },
        ),
        (
            "sinks, window",
            Problem {
                sinks: true,
                first: Some(128),
                ..small
            },
        ),
        (
            "packed documents",
            Problem {
                packed: true,
                ..causal(16, [4096; 2], [32, 8], [64; 2])
            },
        ),
        (
            "packed documents, d128, window",
            Problem {
                packed: true,
                first: Some(1024),
                ..causal(4, [2048; 2], [8, 8], [128; 2])
            },
        ),
    ]
}

#[test]
fn an_h100_serves_what_models_need() {
    let api = match Api::get() {
        Ok(api) => api,
        Err(error) => {
            println!("skipped: {error}");
            return;
        }
    };
    let device = Descriptor::new(api, kind::DEVICE_PROPERTIES).unwrap();
    let json = H100.replace('\n', "");
    device
        .set(
            attribute::DEVICE_PROPERTIES_JSON,
            value::CHAR,
            json.as_bytes(),
        )
        .unwrap();
    let device = device.finalize("the properties of an H100").unwrap();
    let driver = Library::Driver.load().is_ok();
    if !driver {
        println!("the graphs are checked but no plans are made: the driver's library is missing");
    }
    let mut kernels: HashMap<Family, Option<Descriptor>> = HashMap::new();
    for (name, problem) in problems() {
        for pass in [
            Pass::Forward,
            Pass::Backward {
                deterministic: false,
            },
            Pass::Backward {
                deterministic: true,
            },
        ] {
            // Compiling takes its time, and deterministic plans differ in one product.
            if matches!(
                pass,
                Pass::Backward {
                    deterministic: true
                }
            ) && name != "f16"
            {
                continue;
            }
            if !driver {
                let mut graph = Graph::new(api);
                let nodes = match pass {
                    Pass::Forward => problem.forward(&mut graph),
                    Pass::Backward { deterministic } => problem.backward(&mut graph, deterministic),
                };
                nodes.unwrap_or_else(|error| panic!("{name}, {pass:?}: {error}"));
                continue;
            }
            let cache = problem
                .shares_kernels(pass)
                .then(|| kernels.entry(problem.family()).or_default());
            let start = std::time::Instant::now();
            let served = plan(api, pass, &problem, Target::Described(device.raw()), cache)
                .unwrap_or_else(|error| panic!("{name}, {pass:?}: {error}"));
            println!(
                "{name}, {pass:?}: {} bytes of workspace, {:.0} ms",
                served.plan.workspace,
                start.elapsed().as_secs_f64() * 1e3
            );
        }
    }
}

#[test]
fn strides_of_packed_tensors() {
    assert_eq!(by_sequence([2, 3, 5, 7]), [105, 7, 21, 1]);
    assert_eq!(by_head([105, 21, 7]), [105, 7, 21, 1]);
}
