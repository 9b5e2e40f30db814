import assert from 'node:assert/strict'
import { createHash, randomBytes } from 'node:crypto'
import http from 'node:http'
import https from 'node:https'
import { after, before, describe, it } from 'node:test'
import { Sandbox } from 'e2b'
import WebSocket from 'ws'
import { OWN_KERNEL, eventually, mode, origin, routing, signal, testdata, wsOrigin } from './common.mjs'

let sandbox
before(async () => {
  sandbox = await Sandbox.create('base', { timeoutMs: 300_000 })
  for (const name of ['ws_echo.py', 'streams.py']) await sandbox.files.write(name, testdata(name))
  await sandbox.commands.run('mkdir -p www/sub && echo index > www/index.html && echo inner > www/sub/page.txt')
  const server = (cmd) => sandbox.commands.run(cmd, { background: true, timeoutMs: 0 })
  await server('exec python3 -m http.server 8000 --directory www')
  await server('exec python3 ws_echo.py 9000')
  await server('exec python3 streams.py 9001')
  for (const port of [8000, 9001]) await eventually(`port ${port}`, async () => (await fetch(origin(sandbox, port))).ok)
  await eventually('port 9000', async () => (await sandbox.commands.run('python3 -c "import socket; socket.create_connection((\'127.0.0.1\', 9000))"')).exitCode === 0)
})
after(async () => { await sandbox?.kill() })

describe('a server in the sandbox', () => {
  it('is reached by the name that getHost gives', async () => {
    const response = await fetch(origin(sandbox, 8000))
    assert.equal(response.status, 200)
    assert.equal(await response.text(), 'index\n')
    assert.equal((await fetch(`${origin(sandbox, 8000)}/missing`)).status, 404)
  })

  for (const [address, port] of [['127.0.0.1', 8001], ['::1', 8002]]) {
    it(`is reached when it listens on ${address} only, and gone when it ends`, async () => {
      const server = await sandbox.commands.run(`exec python3 -m http.server ${port} --bind ${address} --directory www`, { background: true, timeoutMs: 0 })
      server.wait().catch(() => {})
      await eventually(`port ${port}`, async () => (await fetch(origin(sandbox, port))).ok, 5000)
      assert.equal(await (await fetch(`${origin(sandbox, port)}/sub/page.txt`)).text(), 'inner\n')
      await server.kill()
      await eventually(`the end of port ${port}`, async () => (await fetch(origin(sandbox, port))).status === 502, 5000)
    })
  }

  for (const reuse of [true, false]) {
    it(`may listen where it likes beside and after a listener on the loopback, ${reuse ? 'with' : 'without'} SO_REUSEADDR`, async () => {
      const rebind = `
import socket, time
def listen(host):
    s = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, ${Number(reuse)})
    s.bind((host, 8003))
    s.listen()
    return s
outside = [l.split()[0] for l in open('/etc/hosts') if socket.gethostname() in l.split()][0]
for i in range(100):
    for host in '0.0.0.0', outside, '::':
        loopback = listen('127.0.0.1')
        if i % 25 == 0: time.sleep(0.2)  # is forwarded by then
        if host == outside: listen(host).close()
        loopback.close()
        listen(host).close()
`
      await sandbox.files.write('rebind.py', rebind)
      assert.equal((await sandbox.commands.run('python3 rebind.py')).exitCode, 0)
    })
  }

  it('goes before one on the loopback when it listens on the outside address', async () => {
    const serve = (host, text) => sandbox.commands.run(`exec python3 -c '
import socketserver, http.server
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"${text}")
socketserver.TCPServer(("${host}", 8004), Answer).serve_forever()'`, { background: true, timeoutMs: 0 })
    const answers = (text) => eventually(text, async () => (await (await fetch(origin(sandbox, 8004))).text()) === text, 5000)
    const loopback = await serve('127.0.0.1', 'loopback')
    loopback.wait().catch(() => {})
    await answers('loopback')
    const outside = (await sandbox.commands.run('getent ahostsv4 $(hostname) | cut -d" " -f1 | head -1')).stdout.trim()
    const own = await serve(outside, 'own')
    own.wait().catch(() => {})
    await answers('own')
    for (let i = 0; i < 20; i++) assert.equal(await (await fetch(origin(sandbox, 8004))).text(), 'own')
    await own.kill()
    await answers('loopback')
    await loopback.kill()
  })

  it('cannot change the rules by which ports are forwarded', { skip: OWN_KERNEL && 'the kernel is the sandbox\'s own' }, async () => {
    for (const user of ['user', 'root']) {
      const { stdout } = await sandbox.commands.run('cat /proc/self/status; sudo cat /proc/self/status', { user })
      const sets = [...stdout.matchAll(/^Cap\w+:\s+(\w+)$/gm)]
      assert.equal(sets.length, 10)
      for (const [line, set] of sets) assert.equal(BigInt(`0x${set}`) >> 12n & 1n, 0n, `CAP_NET_ADMIN as ${user}: ${line}`)
    }
  })

  it('redirects without leaving the public name', async () => {
    const response = await fetch(`${origin(sandbox, 8000)}/sub`)
    assert.equal(response.url, `${origin(sandbox, 8000)}/sub/`)
    assert.match(await response.text(), /page\.txt/)
  })

  it('gets paths and queries exactly as they were sent', async () => {
    const path = '/a%2Fb//c/%E2%82%AC/?q=1%202&q=3'
    assert.equal(await (await fetch(origin(sandbox, 9001) + path)).text(), path)
  })

  it('sees the public host name', async () => {
    const headers = await (await fetch(`${origin(sandbox, 9001)}/headers`)).json()
    assert.equal(headers.Host, sandbox.getHost(9001))
  })

  it('streams its answer piece by piece', async () => {
    const response = await fetch(`${origin(sandbox, 9001)}/drip`)
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
    assert.equal((await reader.read()).value, 'data: one\n\n')
    await fetch(`${origin(sandbox, 9001)}/release`) // only now the second piece is sent
    assert.equal((await reader.read()).value, 'data: two\n\n')
    assert.equal((await reader.read()).done, true)
  })

  it('takes a body that is streamed to it', async () => {
    const chunks = Array.from({ length: 8 }, () => randomBytes(256 << 10))
    const body = new ReadableStream({
      pull(c) { chunks.length ? c.enqueue(chunks.shift()) : c.close() },
    })
    const want = createHash('sha256')
    chunks.forEach((c) => want.update(c))
    const response = await fetch(`${origin(sandbox, 9001)}/echo`, { method: 'POST', body, duplex: 'half' })
    const got = createHash('sha256').update(Buffer.from(await response.arrayBuffer())).digest('hex')
    assert.equal(got, want.digest('hex'))
  })

  it('sends 50 MB', async () => {
    let total = 0
    for await (const part of (await fetch(`${origin(sandbox, 9001)}/size/${50 << 20}`)).body) total += part.length
    assert.equal(total, 50 << 20)
  })

  it('is told from a port that nobody listens on', async () => {
    const response = await fetch(origin(sandbox, 8999))
    assert.equal(response.status, 502)
    assert.deepEqual(await response.json(), {
      sandboxId: sandbox.sandboxId, message: 'The sandbox is running but port is not open', port: 8999, code: 502,
    })
  })

  it('is told from a sandbox that is not there', async () => {
    const missing = origin(sandbox, 8000).replace(sandbox.sandboxId, 'a'.repeat(sandbox.sandboxId.length))
    const response = await fetch(missing)
    assert.equal(response.status, 502)
    const body = await response.json()
    assert.equal(body.message, 'The sandbox was not found')
    assert.equal(body.code, 502)
  })
})

describe('a WebSocket', () => {
  const open = async (sbx = sandbox) => {
    const ws = new WebSocket(wsOrigin(sbx, 9000))
    const ready = signal('open')
    ws.on('open', ready.resolve)
    ws.on('error', ready.reject)
    await ready.done
    return ws
  }
  const echo = async (ws, data) => {
    const back = signal('echo')
    ws.once('message', (got, binary) => back.resolve({ got, binary }))
    ws.send(data)
    return back.done
  }

  it('echoes text, binary and a megabyte', async () => {
    const ws = await open()
    const text = await echo(ws, 'grüße €')
    assert.equal(text.got.toString(), 'grüße €')
    assert.equal(text.binary, false)
    for (const size of [0, 200, 70_000, 1 << 20]) {
      const data = randomBytes(size)
      const { got, binary } = await echo(ws, data)
      assert.equal(binary, true)
      assert.ok(data.equals(got), `${size} bytes came back as they were`)
    }
    ws.terminate()
  })

  it('passes ping, pong and the close code', async () => {
    const ws = await open()
    const pong = signal('pong')
    ws.on('pong', (data) => pong.resolve(data.toString()))
    ws.ping('are you there')
    assert.equal(await pong.done, 'are you there')
    const closed = signal('close')
    ws.on('close', (code, reason) => closed.resolve([code, reason.toString()]))
    ws.close(4321, 'done here')
    assert.deepEqual(await closed.done, [4321, 'done here'])
  })

  it('is cut when the sandbox is killed', async () => {
    const victim = await Sandbox.create('base', { timeoutMs: 60_000 })
    await victim.files.write('ws_echo.py', testdata('ws_echo.py'))
    const listening = signal('listening')
    const server = await victim.commands.run('exec python3 ws_echo.py 9000', { background: true, timeoutMs: 0, onStdout: listening.resolve })
    server.wait().catch(() => {})
    await listening.done
    const ws = await open(victim)
    const closed = signal('close')
    ws.on('close', closed.resolve)
    ws.on('error', () => {})
    await victim.kill()
    assert.equal(await closed.done, 1006)
  })
})

describe('a sandbox without public traffic', () => {
  let guarded
  before(async () => {
    guarded = await Sandbox.create('base', {
      timeoutMs: 120_000, network: { allowPublicTraffic: false, maskRequestHost: 'custom-host.example.com:${PORT}' },
    })
    await guarded.files.write('streams.py', testdata('streams.py'))
    const server = await guarded.commands.run('exec python3 streams.py 9001', { background: true, timeoutMs: 0 })
    server.wait().catch(() => {})
    await eventually('port 9001', async () => (await get(guarded.trafficAccessToken)).ok)
  })
  after(async () => { await guarded?.kill() })
  const get = (token, path = '/headers') =>
    fetch(origin(guarded, 9001) + path, token === undefined ? {} : { headers: { 'e2b-traffic-access-token': token } })

  it('is reached with its traffic access token only', async () => {
    for (const token of [undefined, '', 'wrong', guarded.trafficAccessToken.slice(1)]) {
      const response = await get(token)
      assert.equal(response.status, 403)
      const body = await response.json()
      assert.deepEqual([body.sandboxId, body.port, body.code], [guarded.sandboxId, 9001, 403])
    }
    const response = await get(guarded.trafficAccessToken)
    assert.equal(response.status, 200)
    assert.ok(!Object.keys(await response.json()).some((name) => name.toLowerCase().includes('traffic')))
  })

  it('does not ask for the token at its guest agent', async () => {
    assert.equal((await guarded.commands.run('echo hello')).stdout, 'hello\n')
    assert.equal(await guarded.isRunning(), true)
  })

  it('shows the token again to whoever connects', async () => {
    const again = await Sandbox.connect(guarded.sandboxId)
    assert.equal(again.trafficAccessToken, guarded.trafficAccessToken)
    assert.equal(sandbox.trafficAccessToken, undefined)
  })

  it('tells of its network', async () => {
    const { network } = await guarded.getInfo()
    assert.equal(network.allowPublicTraffic, false)
    assert.equal(network.maskRequestHost, 'custom-host.example.com:${PORT}')
    assert.equal((await sandbox.getInfo()).network.allowPublicTraffic, true)
  })

  it('shows its applications the masked host', async () => {
    const headers = await (await get(guarded.trafficAccessToken)).json()
    assert.equal(headers.Host, 'custom-host.example.com:9001')
    assert.equal(headers['X-Forwarded-Host'], guarded.getHost(9001))
  })

  it('is reached by a preview link, in a browser and out of it', async () => {
    const api = process.env.E2B_API_URL ?? `https://api.${process.env.E2B_DOMAIN}`
    const made = await fetch(`${api}/sandboxes/${guarded.sandboxId}/preview-links`, {
      method: 'POST', body: JSON.stringify({ port: 9001 }),
      headers: { 'X-API-Key': process.env.E2B_API_KEY, 'Content-Type': 'application/json' },
    })
    assert.equal(made.status, 201)
    const url = new URL((await made.json()).url)
    assert.equal(url.origin, mode === 'tls' ? origin(guarded, 9001) : new URL(api).origin)
    assert.equal((await fetch(url)).status, 200)

    // fetch would say that it is a script.
    const page = await new Promise((resolve, reject) => {
      const { get } = url.protocol === 'https:' ? https : http
      get(url, { headers: { 'User-Agent': 'Mozilla/5.0', Accept: 'text/html' } }, (res) => resolve(res.resume())).on('error', reject)
    })
    assert.equal(page.statusCode, 302)
    const [cookie] = page.headers['set-cookie']
    assert.match(cookie, mode === 'tls' ? /Path=\/;.*HttpOnly; Secure; SameSite=Lax/ : /Path=\/proxy\/.*HttpOnly; SameSite=Lax/)
    const asset = new URL('headers', new URL(page.headers.location, url))
    assert.equal((await fetch(asset)).status, 403)
    const response = await fetch(asset, { headers: { Cookie: `mine=1; ${cookie.split(';')[0]}` } })
    assert.equal(response.status, 200)
    assert.equal((await response.json()).Cookie, 'mine=1')

    url.searchParams.set('wrenn_preview', url.searchParams.get('wrenn_preview').slice(0, -1))
    const refused = await fetch(url)
    assert.equal(refused.status, 403)
    assert.match((await refused.json()).message, /not valid/)
  })

  it('is not made with a mask that is no host', async () => {
    await assert.rejects(Sandbox.create('base', { network: { maskRequestHost: 'http://x/' } }), /400: maskRequestHost/)
  })
})

describe('a secured sandbox', () => {
  // With E2B_SANDBOX_URL a signed URL does not say which sandbox it is for.
  const extra = () => (mode === 'plain' ? routing(sandbox) : {})
  const envd = (path) => (mode === 'plain' ? process.env.E2B_SANDBOX_URL : origin(sandbox, 49983)) + path

  it('lets a signed URL upload and download', async () => {
    const form = new FormData()
    form.append('file', new Blob(['signed content']), 'ignored')
    const up = await fetch(await sandbox.uploadUrl('signed file.txt'), { method: 'POST', body: form, headers: extra() })
    assert.equal(up.status, 200, await up.text())
    assert.equal(await sandbox.files.read('signed file.txt'), 'signed content')
    const down = await fetch(await sandbox.downloadUrl('signed file.txt', { useSignatureExpiration: 60 }), { headers: extra() })
    assert.equal(down.status, 200)
    assert.equal(await down.text(), 'signed content')
  })

  it('refuses signatures that are expired, wrong or for something else', async () => {
    const expired = await sandbox.downloadUrl('signed file.txt', { useSignatureExpiration: -10 })
    const late = await fetch(expired, { headers: extra() })
    assert.equal(late.status, 401)
    assert.match((await late.json()).message, /signature is already expired/)
    const other = new URL(await sandbox.downloadUrl('signed file.txt'))
    other.searchParams.set('path', '/etc/passwd')
    assert.equal((await fetch(other, { headers: extra() })).status, 401)
    const write = await fetch(await sandbox.downloadUrl('signed file.txt'), { method: 'POST', body: new FormData(), headers: extra() })
    assert.equal(write.status, 401)
  })

  it('refuses files and processes without its token', async () => {
    const read = await fetch(envd('/files?path=/etc/passwd'), { headers: routing(sandbox) })
    assert.equal(read.status, 401)
    assert.match((await read.json()).message, /missing signature query parameter/)
    for (const token of [undefined, 'wrong']) {
      const list = await fetch(envd('/process.Process/List'), {
        method: 'POST', body: '{}',
        headers: { 'Content-Type': 'application/json', ...routing(sandbox), ...(token && { 'X-Access-Token': token }) },
      })
      assert.equal(list.status, 401)
    }
    assert.equal((await fetch(envd('/health'), { headers: routing(sandbox) })).status, 204)
  })

  it('does not serve what is for the host only', async () => {
    for (const route of ['/init', '/freeze', '/upgrade']) {
      const response = await fetch(envd(route), { method: 'POST', body: '{}', headers: routing(sandbox) })
      assert.equal(response.status, 404, route)
    }
  })
})
