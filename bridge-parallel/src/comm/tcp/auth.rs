//! Who may join: both sides show that they know the job's secret, without sending it.
//!
//! The hub sends a nonce; the rank answers with who it is, a nonce of its own, and an HMAC-SHA256 over all of that; the
//! hub proves itself the same way. This keeps strangers and other jobs out. It does not encrypt: the network between the
//! ranks must be trusted, as it must for NCCL.

use std::io;
use std::net::TcpStream;

use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use super::wire::{STRANGER, read, write};

const VERSION: u32 = 1;

type Nonce = [u8; 32];

#[derive(Serialize, Deserialize)]
struct Challenge {
    version: u32,
    nonce: Nonce,
}

#[derive(Serialize, Deserialize)]
struct Hello {
    rank: usize,
    world_size: usize,
    nonce: Nonce,
    proof: Nonce,
}

#[derive(Serialize, Deserialize)]
enum Verdict {
    Welcome { proof: Nonce },
    Refused(String),
}

/// The hub's side: lets a rank in and returns which it is. `admit` may refuse a rank with a reason.
pub(crate) fn admit(
    stream: &mut TcpStream,
    secret: &[u8],
    world_size: usize,
    admit: impl FnOnce(usize) -> Result<(), String>,
) -> io::Result<usize> {
    let ours = nonce()?;
    write(
        stream,
        &Challenge {
            version: VERSION,
            nonce: ours,
        },
        &[],
    )?;
    let (hello, _) = read::<Hello>(stream, STRANGER)?;
    let said = statement(b"rank", &ours, &hello.nonce, hello.rank, hello.world_size);
    let verdict = if mac(secret, &said).verify_slice(&hello.proof).is_err() {
        Err("the secret differs; every rank needs the same one".to_owned())
    } else if hello.world_size != world_size || hello.rank >= world_size {
        Err(format!(
            "rank {} of {} ranks wants to join a job of {world_size}",
            hello.rank, hello.world_size
        ))
    } else {
        admit(hello.rank)
    };
    match verdict {
        Ok(()) => {
            let said = statement(b"hub", &ours, &hello.nonce, hello.rank, world_size);
            let proof = mac(secret, &said).finalize().into_bytes().into();
            write(stream, &Verdict::Welcome { proof }, &[])?;
            Ok(hello.rank)
        }
        Err(reason) => {
            write(stream, &Verdict::Refused(reason.clone()), &[])?;
            Err(io::Error::new(io::ErrorKind::PermissionDenied, reason))
        }
    }
}

/// A rank's side.
pub(crate) fn join(
    stream: &mut TcpStream,
    secret: &[u8],
    rank: usize,
    world_size: usize,
) -> io::Result<()> {
    let (challenge, _) = read::<Challenge>(stream, STRANGER)?;
    if challenge.version != VERSION {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "rank 0 speaks version {} of the protocol, this rank version {VERSION}; run the same program everywhere",
                challenge.version
            ),
        ));
    }
    let ours = nonce()?;
    let said = statement(b"rank", &challenge.nonce, &ours, rank, world_size);
    let proof = mac(secret, &said).finalize().into_bytes().into();
    write(
        stream,
        &Hello {
            rank,
            world_size,
            nonce: ours,
            proof,
        },
        &[],
    )?;
    let refused = |reason: String| io::Error::new(io::ErrorKind::PermissionDenied, reason);
    match read::<Verdict>(stream, STRANGER)?.0 {
        Verdict::Welcome { proof } => {
            let said = statement(b"hub", &challenge.nonce, &ours, rank, world_size);
            let known = mac(secret, &said).verify_slice(&proof).is_ok();
            known
                .then_some(())
                .ok_or_else(|| refused("what answers there does not know the secret".into()))
        }
        Verdict::Refused(reason) => Err(refused(reason)),
    }
}

fn statement(
    side: &[u8],
    hub: &Nonce,
    rank_nonce: &Nonce,
    rank: usize,
    world_size: usize,
) -> Vec<u8> {
    let mut said = side.to_vec();
    said.extend(hub);
    said.extend(rank_nonce);
    said.extend((rank as u64).to_le_bytes());
    said.extend((world_size as u64).to_le_bytes());
    said
}

/// Comparison through the `hmac` crate takes the same time wherever the difference lies.
fn mac(secret: &[u8], said: &[u8]) -> Hmac<Sha256> {
    let mut mac =
        <Hmac<Sha256> as Mac>::new_from_slice(secret).expect("HMAC takes keys of any length");
    mac.update(said);
    mac
}

fn nonce() -> io::Result<Nonce> {
    let mut nonce = Nonce::default();
    getrandom::fill(&mut nonce).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(nonce)
}
