import assert from 'node:assert/strict'
import { after, before, describe, it } from 'node:test'
import { NotFoundError, Sandbox } from 'e2b'
import { eventually, origin, SLOWER } from './common.mjs'

// counter writes a growing number as long as it runs.
const counter = 'i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done'

describe('pause, snapshot, fork', () => {
  const made = []
  const create = async (template, opts) => {
    const sandbox = await Sandbox.create(template, { timeoutMs: 120_000, ...opts })
    made.push(sandbox)
    return sandbox
  }
  let sandbox
  before(async () => { sandbox = await create('base') })
  after(async () => { await Promise.all(made.map((s) => s.kill())) })

  it('goes on where it was paused', async () => {
    await sandbox.files.write('/home/user/kept', 'content')
    const handle = await sandbox.commands.run(counter, { background: true, timeoutMs: 0 })
    handle.wait().catch(() => {}) // its stream ends with the pause
    assert.equal(await sandbox.pause(), true)
    assert.equal(await sandbox.pause(), false)
    assert.equal(await sandbox.isRunning(), false)
    assert.equal((await sandbox.getInfo()).state, 'paused')
    await sandbox.connect()
    assert.equal((await sandbox.getInfo()).state, 'running')
    assert.equal(await sandbox.files.read('/home/user/kept'), 'content')
    let last = 0
    const again = await sandbox.commands.connect(handle.pid, { onStdout: (text) => { last = Number(text.trim().split('\n').pop()) } })
    await eventually('the counter goes on', () => last > 5)
    await again.kill()
  })

  it('starts anew from its files when they are all that was kept', async () => {
    const { pid } = await sandbox.commands.run('sleep 600', { background: true, timeoutMs: 0 })
    await sandbox.pause({ keepMemory: false })
    await sandbox.connect()
    assert.equal(await sandbox.files.read('/home/user/kept'), 'content')
    assert.equal((await sandbox.commands.list()).some((p) => p.pid === pid && p.args.includes('sleep 600')), false)
  })

  it('is paused at the end of its time, and woken by many requests at once', async () => {
    const sleeper = await create('base', { timeoutMs: 3000 * SLOWER, lifecycle: { onTimeout: 'pause', autoResume: true } })
    await sleeper.commands.run('python3 -m http.server 8000 >/dev/null 2>&1 &')
    await eventually('the server', async () => (await fetch(origin(sleeper, 8000))).status === 200)
    await eventually('the pause', async () => (await sleeper.getInfo()).state === 'paused')
    const answers = await Promise.all(Array.from({ length: 20 }, () => fetch(origin(sleeper, 8000))))
    assert.deepEqual(answers.map((a) => a.status), Array(20).fill(200))
    assert.deepEqual((await sleeper.getInfo()).lifecycle, { onTimeout: 'pause', autoResume: true })
  })

  it('is what others start from', async () => {
    const name = `js-${process.env.MODE}-${process.pid}`
    const { snapshotId, names } = await sandbox.createSnapshot({ name })
    assert.equal(names.length, 1)
    assert.equal(await sandbox.isRunning(), true)
    for (const template of [snapshotId, name, names[0]]) {
      const copy = await create(template)
      assert.notEqual(copy.sandboxId, sandbox.sandboxId)
      assert.equal(await copy.files.read('/home/user/kept'), 'content')
      assert.equal((await copy.commands.run('printf %s $E2B_SANDBOX_ID')).stdout, copy.sandboxId)
    }
    const listed = await Sandbox.listSnapshots({ name }).nextItems()
    assert.deepEqual(listed.map((s) => s.snapshotId), [snapshotId])
    assert.equal(await Sandbox.deleteSnapshot(snapshotId), true)
    assert.equal(await Sandbox.deleteSnapshot(snapshotId), false)
    await assert.rejects(Sandbox.create(name), /404/)
  })

  it('has forks that are their own', async () => {
    const forks = await sandbox.fork({ count: 3, timeoutMs: 60_000 })
    made.push(...forks)
    assert.equal(new Set([sandbox, ...forks].map((s) => s.sandboxId)).size, 4)
    await Promise.all(forks.map((f, i) => f.files.write('/home/user/kept', `fork ${i}`)))
    assert.equal(await sandbox.files.read('/home/user/kept'), 'content')
    assert.deepEqual(await Promise.all(forks.map((f) => f.files.read('/home/user/kept'))), ['fork 0', 'fork 1', 'fork 2'])
    const random = await Promise.all(forks.map(async (f) => (await f.commands.run('head -c 16 /dev/urandom | od -An -tx1')).stdout))
    assert.equal(new Set(random).size, 3)
  })

  it('is gone when it is killed while it is paused', async () => {
    const victim = await create('base')
    await victim.pause()
    assert.equal(await victim.kill(), true)
    assert.equal(await victim.kill(), false)
    await assert.rejects(victim.connect(), NotFoundError)
  })
})
