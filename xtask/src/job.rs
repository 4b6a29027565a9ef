//! Which rank of which job this process is, as its launcher says in the environment.
//!
//! Understood are `cargo xtask launch`, `torchrun`, Open MPI's `mpirun` and Slurm's `srun`, in this order. No other part
//! of the program reads these variables.

use std::time::Duration;

use bridge_parallel::JobOptions;

use crate::failure::{Failure, Result};

/// Variables that `launch` sets. Users set the secret, and may set the address and the timeout, under other launchers.
pub(crate) const RANK: &str = "BRIDGE_RANK";
pub(crate) const WORLD_SIZE: &str = "BRIDGE_WORLD_SIZE";
pub(crate) const LOCAL_RANK: &str = "BRIDGE_LOCAL_RANK";
pub(crate) const RENDEZVOUS: &str = "BRIDGE_RENDEZVOUS";
pub(crate) const SECRET: &str = "BRIDGE_SECRET";
pub(crate) const TIMEOUT: &str = "BRIDGE_TIMEOUT";
pub(crate) const LAUNCHER: &str = "BRIDGE_LAUNCHER_PID";

/// How messages call `cargo xtask launch`.
const LAUNCH: &str = "launch";

/// This process's place in a job.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// Rank, number of processes, address, secret and limits.
    pub(crate) options: JobOptions,
    /// Rank among the processes of this machine, which is also the device to use.
    pub(crate) local_rank: usize,
}

/// The job that this process belongs to; `None` if it is alone.
pub(crate) fn from_environment() -> Result<Option<Job>> {
    read(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
}

/// Ends this process when its launcher dies, so that a killed launcher leaves nothing behind.
pub(crate) fn follow_launcher() {
    #[cfg(target_os = "linux")]
    if let Ok(launcher) = std::env::var(LAUNCHER) {
        use rustix::process::{Signal, getppid, set_parent_process_death_signal};
        // The variable is inherited by whatever this process starts in turn, so it counts only from the launcher itself.
        let parent = getppid().map(|pid| pid.as_raw_nonzero().to_string());
        if parent.as_deref() == Some(launcher.as_str()) {
            // Refused by old kernels only; then the other ranks' ends have to do.
            let _ = set_parent_process_death_signal(Some(Signal::TERM));
        }
    }
}

type Variables<'a> = &'a dyn Fn(&str) -> Option<String>;

/// What a launcher says.
struct Place {
    launcher: &'static str,
    rank: usize,
    world_size: usize,
    local_rank: usize,
    /// `HOST:PORT` of rank 0, if the launcher names one.
    rendezvous: Option<String>,
    /// Tells apart jobs on one machine, where no secret is set.
    id: String,
}

fn read(get: Variables<'_>) -> Result<Option<Job>> {
    let places = [from_launch, from_torchrun, from_open_mpi, from_slurm];
    let mut place = None;
    for read in places {
        place = read(get)?;
        if place.is_some() {
            break;
        }
    }
    // Schedulers start programs that are alone as jobs of one process, too; who types `launch --nproc 1` wants a job.
    let is_job = |place: &Place| place.world_size > 1 || place.launcher == LAUNCH;
    let Some(place) = place.filter(is_job) else {
        return Ok(None);
    };
    let rendezvous = get(RENDEZVOUS).or(place.rendezvous).ok_or_else(|| {
        Failure::input(format!(
            "{} does not say where rank 0 is; set {RENDEZVOUS}=HOST:PORT, the same on every rank",
            place.launcher
        ))
    })?;
    let secret = match get(SECRET) {
        Some(secret) => secret,
        None if is_loopback(&rendezvous) => format!("local job {}", place.id),
        None => {
            return Err(Failure::input(format!(
                "ranks that meet at {rendezvous} need a shared secret; set {SECRET} to the same random text on every rank, \
                 for example by `export {SECRET}=$(openssl rand -hex 32)` before {}",
                place.launcher
            )));
        }
    };
    let mut options = JobOptions::new(place.rank, place.world_size, rendezvous, secret.as_bytes());
    if let Some(seconds) = number(get, TIMEOUT)? {
        options.timeout = Duration::from_secs(seconds.max(1) as u64);
        options.join_timeout = options.join_timeout.min(options.timeout);
    }
    if options.rank >= options.world_size {
        return Err(Failure::input(format!(
            "{} says rank {} of {}; ranks count from 0",
            place.launcher, options.rank, options.world_size
        )));
    }
    Ok(Some(Job {
        options,
        local_rank: place.local_rank,
    }))
}

fn from_launch(get: Variables<'_>) -> Result<Option<Place>> {
    let Some(rank) = number(get, RANK)? else {
        return Ok(None);
    };
    Ok(Some(Place {
        launcher: LAUNCH,
        rank,
        world_size: required(get, WORLD_SIZE)?,
        local_rank: required(get, LOCAL_RANK)?,
        rendezvous: None,
        id: "of launch".into(),
    }))
}

fn from_torchrun(get: Variables<'_>) -> Result<Option<Place>> {
    let (Some(id), Some(rank)) = (get("TORCHELASTIC_RUN_ID"), number(get, "RANK")?) else {
        return Ok(None);
    };
    // The port itself may be held by torchrun's own store.
    Ok(Some(Place {
        launcher: "torchrun",
        rank,
        world_size: required(get, "WORLD_SIZE")?,
        local_rank: required(get, "LOCAL_RANK")?,
        rendezvous: master(get, 1)?,
        id,
    }))
}

fn from_open_mpi(get: Variables<'_>) -> Result<Option<Place>> {
    let Some(rank) = number(get, "OMPI_COMM_WORLD_RANK")? else {
        return Ok(None);
    };
    let world_size = required(get, "OMPI_COMM_WORLD_SIZE")?;
    let one_host = number(get, "OMPI_COMM_WORLD_LOCAL_SIZE")? == Some(world_size);
    let id = get("PMIX_NAMESPACE")
        .or(get("OMPI_MCA_ess_base_jobid"))
        .unwrap_or_default();
    let local = one_host.then(|| format!("127.0.0.1:{}", port_of(&id)));
    Ok(Some(Place {
        launcher: "mpirun",
        rank,
        world_size,
        local_rank: required(get, "OMPI_COMM_WORLD_LOCAL_RANK")?,
        rendezvous: master(get, 0)?.or(local),
        id,
    }))
}

fn from_slurm(get: Variables<'_>) -> Result<Option<Place>> {
    // A batch script has SLURM_PROCID too; only a step, which srun starts, is a job of ours.
    let (Some(_), Some(rank)) = (get("SLURM_STEP_ID"), number(get, "SLURM_PROCID")?) else {
        return Ok(None);
    };
    let world_size = match number(get, "SLURM_STEP_NUM_TASKS")? {
        Some(tasks) => tasks,
        None => required(get, "SLURM_NTASKS")?,
    };
    let id = get("SLURM_JOB_ID").unwrap_or_default();
    let nodes = get("SLURM_STEP_NODELIST").or(get("SLURM_JOB_NODELIST"));
    let host = nodes.as_deref().and_then(first_host);
    Ok(Some(Place {
        launcher: "srun",
        rank,
        world_size,
        local_rank: required(get, "SLURM_LOCALID")?,
        rendezvous: master(get, 0)?.or(host.map(|host| format!("{host}:{}", port_of(&id)))),
        id,
    }))
}

/// `MASTER_ADDR:MASTER_PORT`, the port raised by `above`.
fn master(get: Variables<'_>, above: usize) -> Result<Option<String>> {
    match (get("MASTER_ADDR"), number(get, "MASTER_PORT")?) {
        (Some(host), Some(port)) => Ok(Some(format!("{host}:{}", port + above))),
        _ => Ok(None),
    }
}

/// A port that two jobs on one machine are unlikely to share.
fn port_of(id: &str) -> u32 {
    let hash = id.bytes().fold(0u32, |hash, byte| {
        hash.wrapping_mul(31).wrapping_add(u32::from(byte))
    });
    20_000 + hash % 10_000
}

/// The first host of Slurm's compressed list: `gpu[03-07,9],login1` gives `gpu03`.
fn first_host(list: &str) -> Option<String> {
    let name_end = list.find([',', '[']).unwrap_or(list.len());
    let name = &list[..name_end];
    let host = match list[name_end..].strip_prefix('[') {
        None => name.to_owned(),
        Some(rest) => {
            let (ranges, after) = rest.split_once(']')?;
            let first = ranges.split([',', '-']).next()?;
            let suffix = after.split(',').next().unwrap_or_default();
            format!("{name}{first}{suffix}")
        }
    };
    (!host.is_empty() && !host.contains('[')).then_some(host)
}

fn is_loopback(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host == "localhost"
        || host
            .trim_matches(['[', ']'])
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

fn number(get: Variables<'_>, name: &str) -> Result<Option<usize>> {
    let Some(text) = get(name) else {
        return Ok(None);
    };
    let parsed = text.trim().parse();
    parsed
        .map(Some)
        .map_err(|_| Failure::input(format!("{name} is `{text}`, expected a number")))
}

fn required(get: Variables<'_>, name: &str) -> Result<usize> {
    number(get, name)?.ok_or_else(|| {
        Failure::input(format!(
            "{name} is not set, though its launcher's other variables are"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(variables: &[(&str, &str)]) -> Result<Option<(usize, usize, usize, String)>> {
        let get = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        let found = read(&get)?;
        Ok(found.map(|job| {
            (
                job.options.rank,
                job.options.world_size,
                job.local_rank,
                job.options.rendezvous,
            )
        }))
    }

    #[test]
    fn launchers_are_understood() {
        assert_eq!(job(&[]).unwrap(), None);
        let launch = [
            ("BRIDGE_RANK", "3"),
            ("BRIDGE_WORLD_SIZE", "4"),
            ("BRIDGE_LOCAL_RANK", "1"),
            ("BRIDGE_RENDEZVOUS", "10.0.0.1:7000"),
            ("BRIDGE_SECRET", "s"),
        ];
        assert_eq!(
            job(&launch).unwrap(),
            Some((3, 4, 1, "10.0.0.1:7000".into()))
        );
        let torchrun = [
            ("TORCHELASTIC_RUN_ID", "x"),
            ("RANK", "1"),
            ("WORLD_SIZE", "2"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "localhost"),
            ("MASTER_PORT", "29500"),
        ];
        assert_eq!(
            job(&torchrun).unwrap(),
            Some((1, 2, 1, "localhost:29501".into()))
        );
        // Without torchrun's id these names mean nothing.
        assert_eq!(job(&torchrun[1..]).unwrap(), None);
        let slurm = [
            ("SLURM_STEP_ID", "0"),
            ("SLURM_PROCID", "9"),
            ("SLURM_NTASKS", "16"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_JOB_ID", "12"),
            ("SLURM_STEP_NODELIST", "gpu[03-04]"),
            ("BRIDGE_SECRET", "s"),
        ];
        let (rank, world_size, local_rank, address) = job(&slurm).unwrap().unwrap();
        assert_eq!((rank, world_size, local_rank), (9, 16, 1));
        assert!(address.starts_with("gpu03:2"), "{address}");
        let text = job(&slurm[..6]).unwrap_err().text();
        assert!(text.contains("need a shared secret"), "{text}");
        // A batch script is no step.
        assert_eq!(job(&slurm[1..]).unwrap(), None);
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "0"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ];
        assert!(job(&mpi).unwrap().unwrap().3.starts_with("127.0.0.1:2"));
        let text = job(&mpi[..3]).unwrap_err().text();
        assert!(
            text.contains("mpirun does not say where rank 0 is"),
            "{text}"
        );
        // One process is a job under `launch` alone.
        let alone = [
            ("TORCHELASTIC_RUN_ID", "x"),
            ("RANK", "0"),
            ("WORLD_SIZE", "1"),
            ("LOCAL_RANK", "0"),
        ];
        assert_eq!(job(&alone).unwrap(), None);
        let alone = [
            ("BRIDGE_RANK", "0"),
            ("BRIDGE_WORLD_SIZE", "1"),
            ("BRIDGE_LOCAL_RANK", "0"),
            ("BRIDGE_RENDEZVOUS", "127.0.0.1:7000"),
        ];
        let found = job(&alone).unwrap();
        assert_eq!(found, Some((0, 1, 0, "127.0.0.1:7000".into())));
        let text = job(&[("BRIDGE_RANK", "one")]).unwrap_err().text();
        assert_eq!(text, "BRIDGE_RANK is `one`, expected a number");
    }

    #[test]
    fn the_first_host_of_a_list() {
        for (list, host) in [
            ("node1", Some("node1")),
            ("a,b", Some("a")),
            ("gpu[03-07,9],login1", Some("gpu03")),
            ("rack[2,5]-n1,x", Some("rack2-n1")),
            ("", None),
            ("gpu[03", None),
        ] {
            assert_eq!(first_host(list).as_deref(), host, "{list}");
        }
    }
}
