//! Peak memory of this process, as the kernel counts it.

use std::fs;

/// Most resident memory since the start or the last [`reset_peak`], in bytes; `None` where the system does not say.
pub(crate) fn peak() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// Starts the count anew, so that the peaks of two phases are told apart. Returns whether the system did so.
pub(crate) fn reset_peak() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// Bytes in GiB with two decimals.
pub(crate) fn gib(bytes: Option<u64>) -> Option<f64> {
    bytes.map(|b| (b as f64 / f64::from(1u32 << 30) * 100.0).round() / 100.0)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_peak_sees_an_allocation() {
        reset_peak();
        let before = peak().expect("Linux tells");
        let block = vec![1u8; 64 << 20];
        assert!(block.iter().map(|b| u64::from(*b)).sum::<u64>() > 0);
        assert!(peak().expect("Linux tells") >= before + (60 << 20));
    }
}
