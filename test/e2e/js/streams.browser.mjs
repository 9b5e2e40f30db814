import assert from 'node:assert/strict'
import { inEachForm, protocol } from './browser.mjs'

inEachForm('clock', 'events come one by one, and go on where they were after the stream has ended', async (page, address) => {
  await page.goto(address)
  assert.equal(await protocol(page), address.startsWith('https') ? 'h2' : 'http/1.1')
  const events = await page.evaluate(() => new Promise((resolve, reject) => {
    const source = new EventSource('clock?limit=5')
    const got = []
    setTimeout(() => reject(new Error(`only ${got.length} events came`)), 20_000)
    source.onmessage = (e) => {
      got.push({ id: e.lastEventId, late: Date.now() / 1000 - Number(e.data) })
      if (got.length === 12) { source.close(); resolve(got) }
    }
  }))
  assert.deepEqual(events.map((e) => e.id), Array.from({ length: 12 }, (_, i) => String(i + 1)))
  for (const { id, late } of events) assert.ok(late < 1, `event ${id} came ${late} s after it was sent`)
})

inEachForm('echo', 'a WebSocket carries text, bytes and codes', async (page, address) => {
  await page.goto(address) // so that there is an HTTP/2 connection, over TLS
  const handshakes = await page.context().newCDPSession(page)
  await handshakes.send('Network.enable')
  const statuses = []
  handshakes.on('Network.webSocketHandshakeResponseReceived', ({ response }) => statuses.push(response.status))
  const got = await page.evaluate(async (url) => {
    const open = async () => {
      const socket = new WebSocket(url, ['echo.v2', 'echo.v1'])
      socket.binaryType = 'arraybuffer'
      socket.received = []
      socket.next = () => new Promise((resolve, reject) => {
        socket.onmessage = (e) => resolve(e.data)
        socket.onclose = (e) => reject(new Error(`closed with ${e.code}`))
      })
      await new Promise((resolve, reject) => { socket.onopen = resolve; socket.onerror = () => reject(new Error('cannot connect')) })
      return socket
    }
    const end = (socket) => new Promise((resolve) => { socket.onclose = (e) => resolve([e.code, e.reason, e.wasClean]) })
    const echo = async (socket, data) => { const answer = socket.next(); socket.send(data); return answer }

    const socket = await open()
    const big = new Uint8Array(1 << 20).map((_, i) => i * 7)
    const back = new Uint8Array(await echo(socket, big))
    const result = {
      protocol: socket.protocol,
      text: await echo(socket, 'grüße'),
      split: await echo(socket, 'split fragments'),
      big: back.length === big.length && back.every((byte, i) => byte === big[i]),
    }
    const ours = end(socket)
    socket.close(4001, 'enough')
    result.ours = await ours
    const other = await open()
    const theirs = end(other)
    other.send('close 4002')
    result.theirs = await theirs
    return result
  }, address.replace(/^http/, 'ws'))
  assert.deepEqual(got, {
    protocol: 'echo.v2', text: 'grüße', split: 'fragments', big: true,
    ours: [4001, 'enough', true], theirs: [4002, 'as you say', true],
  })
  // 200 says that it is a stream of the HTTP/2 connection.
  assert.deepEqual(statuses, address.startsWith('https') ? [200, 200] : [101, 101])
})
