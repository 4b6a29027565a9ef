//! Every group of checks, on GPU 0. Without a GPU the test says that it is skipped.

mod checks;

use bridge_cuda::CudaDevice;

#[test]
fn groups_are_sound_on_the_cpu() {
    let mut unsound = Vec::new();
    for group in checks::groups() {
        for &dtype in group.dtypes {
            // A panic prints its own message; the loop goes on to find the others.
            if !std::panic::catch_unwind(|| checks::run_on_cpu(&group, dtype))
                .is_ok_and(|count| count > 0)
            {
                unsound.push(format!("{} {dtype:?}", group.name));
            }
        }
    }
    assert!(
        unsound.is_empty(),
        "these groups fail or record nothing: {unsound:?}"
    );
}

#[test]
fn gpu_agrees_with_cpu() {
    let device = match CudaDevice::open(0) {
        Ok(device) => device,
        Err(error) => {
            println!("skipped: no CUDA device: {error}");
            return;
        }
    };
    let mut failures = Vec::new();
    for group in checks::groups() {
        for &dtype in group.dtypes {
            let (_, found) = checks::run(&group, dtype, device);
            failures.extend(
                found
                    .into_iter()
                    .map(|text| format!("{} {dtype:?}: {text}", group.name)),
            );
        }
    }
    assert!(
        failures.is_empty(),
        "{} differences:\n{}",
        failures.len(),
        failures.join("\n")
    );
}
