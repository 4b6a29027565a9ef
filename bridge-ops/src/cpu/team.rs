//! Threads that help whoever has work to share.
//!
//! A model calls thousands of kernels per step and hundreds per generated token, many of them some ten microseconds
//! long, so what matters is how little it costs to get a second thread going, and that a thread which is late (because
//! another program has its core) holds nobody up. Hence: the caller works itself, taking jobs by number until there are
//! none left; workers join in if and when they come by; at the end the caller waits only for those that did. A worker
//! with nothing to do looks around for some microseconds before it goes to sleep.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// How often an idle worker looks for work before it sleeps: some 50 microseconds, longer than the pauses between
/// the kernels of a model.
const LOOKS: usize = 2000;
/// How often a caller looks whether its workers are done before it offers its core to others.
const WAITS: usize = 1000;

/// Runs `run(0) .. run(count - 1)`, each once, on the calling thread and up to `threads - 1` workers.
///
/// # Panics
/// When a job does, after the jobs under way have ended.
pub(super) fn share(threads: usize, count: usize, run: &(dyn Fn(usize) + Sync)) {
    static TEAM: Team = Team {
        state: Mutex::new(State {
            work: Vec::new(),
            workers: 0,
            sleepers: 0,
        }),
        wake: Condvar::new(),
        open: AtomicUsize::new(0),
    };
    TEAM.share(threads.min(count), count, run);
}

struct Team {
    state: Mutex<State>,
    wake: Condvar,
    /// Number of entries of `work` that have places left; read without the lock by idle workers.
    open: AtomicUsize,
}

struct State {
    work: Vec<Shared>,
    workers: usize,
    sleepers: usize,
}

/// Work that workers may join.
struct Shared {
    work: *const Work<'static>,
    /// How many more workers may.
    places: usize,
}

// SAFETY: the pointer is used only while its entry is in the list or its work counts the user as active; the caller of
// `share` keeps the work alive that long.
unsafe impl Send for Shared {}

struct Work<'a> {
    run: &'a (dyn Fn(usize) + Sync),
    count: usize,
    /// The next job to be taken.
    next: AtomicUsize,
    /// Workers that joined and have not left.
    active: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Work<'_> {
    fn take_jobs(&self) {
        loop {
            let job = self.next.fetch_add(1, Ordering::Relaxed);
            if job >= self.count {
                return;
            }
            (self.run)(job);
        }
    }
}

impl Team {
    fn share(&'static self, threads: usize, count: usize, run: &(dyn Fn(usize) + Sync)) {
        if threads <= 1 {
            return (0..count).for_each(run);
        }
        let work = Work {
            run,
            count,
            next: AtomicUsize::new(0),
            active: AtomicUsize::new(0),
            panic: Mutex::new(None),
        };
        self.publish(&work, threads - 1);
        let own = catch_unwind(AssertUnwindSafe(|| work.take_jobs()));
        if own.is_err() {
            // Nobody needs to start the jobs that are left.
            work.next.store(count, Ordering::Relaxed);
        }
        self.withdraw(&work);
        let panic = work
            .panic
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(panic) = own.err().or(panic) {
            resume_unwind(panic);
        }
    }

    /// Puts work up; [`withdraw`](Self::withdraw) must follow before it ends.
    fn publish(&'static self, work: &Work<'_>, places: usize) {
        let mut state = self.lock();
        while state.workers < places {
            state.workers += 1;
            let name = format!("bridge-ops-{}", state.workers);
            let spawned = std::thread::Builder::new()
                .name(name)
                .spawn(|| self.run_worker());
            if spawned.is_err() {
                // The system has no more threads to give: those there are do the work.
                state.workers -= 1;
                break;
            }
        }
        // The lifetime ends with `withdraw`, which waits until no worker uses the work.
        let work = std::ptr::from_ref(work).cast::<Work<'static>>();
        state.work.push(Shared { work, places });
        self.open.fetch_add(1, Ordering::Release);
        let wanted = places.min(state.sleepers);
        drop(state);
        (0..wanted).for_each(|_| self.wake.notify_one());
    }

    /// Takes work off the list and waits for the workers that joined.
    fn withdraw(&self, work: &Work<'_>) {
        let mut state = self.lock();
        let of_this = |shared: &Shared| std::ptr::addr_eq(shared.work, work);
        let entry = state
            .work
            .iter()
            .position(of_this)
            .expect("published work is on the list");
        if state.work.swap_remove(entry).places > 0 {
            self.open.fetch_sub(1, Ordering::Release);
        }
        drop(state);
        let mut waits = 0;
        while work.active.load(Ordering::Acquire) > 0 {
            waits += 1;
            if waits < WAITS {
                std::hint::spin_loop()
            } else {
                std::thread::yield_now()
            }
        }
    }

    fn run_worker(&self) {
        loop {
            let seen = (0..LOOKS).any(|_| {
                std::hint::spin_loop();
                self.open.load(Ordering::Acquire) > 0
            });
            let mut state = self.lock();
            let Some(shared) = state.work.iter_mut().find(|shared| shared.places > 0) else {
                // Where another worker was quicker, more work is likely to follow.
                if !seen {
                    state.sleepers += 1;
                    state = self
                        .wake
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                    state.sleepers -= 1;
                }
                continue;
            };
            shared.places -= 1;
            if shared.places == 0 {
                self.open.fetch_sub(1, Ordering::Release);
            }
            // SAFETY: the work is on the list, so its caller has not taken it off, and once it counts this worker as
            // active the caller waits.
            let work = unsafe { &*shared.work };
            work.active.fetch_add(1, Ordering::Relaxed);
            drop(state);

            let result = catch_unwind(AssertUnwindSafe(|| work.take_jobs()));
            if let Err(panic) = result {
                work.next.store(work.count, Ordering::Relaxed);
                *work.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
            }
            // The caller may end the work from here on.
            work.active.fetch_sub(1, Ordering::Release);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_job_runs_once() {
        for (threads, count) in [(1, 5), (2, 1), (2, 2), (3, 1000), (8, 3), (4, 0)] {
            for _ in 0..200 {
                let runs: Vec<_> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                share(threads, count, &|job| {
                    runs[job].fetch_add(1, Ordering::Relaxed);
                });
                assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn callers_on_many_threads_and_within_jobs_do_not_disturb_each_other() {
        std::thread::scope(|scope| {
            for caller in 0..6 {
                scope.spawn(move || {
                    for round in 0..300 {
                        let sum = AtomicUsize::new(0);
                        share(3, 7, &|job| {
                            share(2, job, &|inner| {
                                sum.fetch_add(caller + round + inner, Ordering::Relaxed);
                            });
                        });
                        let expected: usize = (0..7)
                            .flat_map(|job| 0..job)
                            .map(|inner| caller + round + inner)
                            .sum();
                        assert_eq!(sum.into_inner(), expected);
                    }
                });
            }
        });
    }

    #[test]
    fn workers_do_take_part() {
        let main = std::thread::current().id();
        let others = AtomicUsize::new(0);
        share(2, 50, &|_| {
            std::thread::sleep(Duration::from_millis(2));
            if std::thread::current().id() != main {
                others.fetch_add(1, Ordering::Relaxed);
            }
        });
        assert!(others.into_inner() > 0);
    }

    #[test]
    fn a_panic_reaches_the_caller_after_the_others_have_finished() {
        for job_that_panics in [0, 1, 19] {
            let running = AtomicUsize::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                share(4, 20, &|job| {
                    running.fetch_add(1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_micros(100));
                    running.fetch_sub(1, Ordering::SeqCst);
                    assert!(job != job_that_panics, "job {job} fails");
                });
            }));
            let message = *result.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(message, format!("job {job_that_panics} fails"));
            assert_eq!(running.into_inner(), 0);
        }
        // And the team still works.
        share(4, 20, &|_| ());
    }
}
